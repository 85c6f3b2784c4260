"""Masks over several modalities: how many tokens of each stay visible is drawn from a Dirichlet distribution.

After MultiMAE (arXiv 2204.01678, section 3.3). Shares of the modalities are drawn for each crop; each modality keeps
its share of the visible tokens, rounded half to even, uniformly at random; then random tokens are added or taken away
until exactly the wanted number is visible. With alpha = 1 every division is equally likely; a small alpha shows mostly
one modality, a large one as much of each.

Legend: M modalities with N tokens each; a mask is bool [M*N], modality by modality, True = hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor

from .settings import DirichletMask, MaskSettings


def mask_grid(settings: MaskSettings, grids: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The grid a mask is drawn on: the tokens of its view, (rows, columns); of several modalities (M, N).

    Raises:
        ValueError: if the views of a mask over several have other token grids.
    """
    rows, columns = grids[settings.view]
    if not isinstance(settings, DirichletMask):
        return rows, columns
    for view in settings.beside:
        if tuple(grids[view]) != (rows, columns):
            raise ValueError(
                f"a dirichlet mask is over views with one token grid, but {settings.view!r} has {rows} x {columns} and "
                f"{view!r} {grids[view][0]} x {grids[view][1]}: make it like: {settings.view}, with a modality"
            )
    return 1 + len(settings.beside), rows * columns


def draw_dirichlet(alpha: float, visible: int, grid: tuple[int, int], rng: Random) -> Tensor:
    """The mask of one sample: bool [M*N] with exactly `visible` tokens that are not hidden.

    Args:
        alpha: concentration, the same for all modalities.
        visible: tokens that stay, of all modalities.
        grid: (M, N).
    """
    modalities, tokens = grid
    weights = [rng.gammavariate(alpha, 1.0) for _ in range(modalities)]  # normalised gammas are a Dirichlet draw
    rank: list[float] = []  # below 1: the modality's share; the repair takes the lowest
    for weight in weights:
        wanted = round(visible * weight / sum(weights))  # half to even, as in the official code
        noise = [rng.random() for _ in range(tokens)]
        kept = set(sorted(range(tokens), key=noise.__getitem__)[:wanted])
        rank += [rng.random() + (place not in kept) for place in range(tokens)]
    hidden = torch.ones(modalities * tokens, dtype=torch.bool)
    hidden[sorted(range(len(rank)), key=rank.__getitem__)[:visible]] = False
    return hidden
