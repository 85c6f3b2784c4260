"""I-JEPA's masks (arXiv 2301.08243, section 3): a few large blocks to predict, and a context that sees none of them.

All crops of an optimizer step share the blocks' height and width, drawn from (seed, step), so that predictions stack;
places are drawn for each crop. Scale and aspect are drawn apart: the published code derives both from one number.
Bounds are inclusive: with its exclusive ones the last row and column are never predicted, nor seen.

Published contexts differ in size; there, every batch is cut to its smallest context, whose *last* rows are lost first.
Here the context has the same number of tokens in every crop of the run, so that the encoder's shapes never change, and
a random choice of the context block's free tokens is kept. The default, 25 %, is what the published cut leaves of a 14
x 14 grid in a batch of 128 (26 % on average; 1 crop in 100 has less, and is drawn again).

Legend: a grid is (rows, columns) of tokens, N = rows x columns, row-major; T targets; True = hidden, or to predict.
"""

from __future__ import annotations

import math
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from .settings import MultiBlockMask

_TRIES = 20  # I-JEPA, after which it lets the context see a target; here the targets then share one place

Size = tuple[int, int]


class Sizes(NamedTuple):
    """(height, width) in tokens, the same for a whole step."""

    target: Size
    context: Size


def draw_sizes(settings: MultiBlockMask, grid: Size, rng: Random) -> Sizes:
    """Sizes of the blocks of one step."""
    tokens = grid[0] * grid[1]
    low, high = math.log(settings.target_aspect[0]), math.log(settings.target_aspect[1])
    area = int(tokens * _uniform(rng, *settings.target_scale))
    target = _size(area, math.exp(_uniform(rng, low, high)), grid)
    context = _size(int(tokens * _uniform(rng, *settings.context_scale)), grid[0] / grid[1], grid)
    return Sizes(target, context)


def draw_multiblock(settings: MultiBlockMask, grid: Size, sizes: Sizes, rng: Random) -> tuple[Tensor, Tensor]:
    """The context and the targets of one crop: bool [N], True where the context does not see; bool [T, N]."""
    visible = visible_count(settings, grid)
    for _ in range(_TRIES):
        targets = [_place(sizes.target, grid, rng) for _ in range(settings.targets)]
        free = _place(sizes.context, grid, rng)
        for target in targets:
            free &= ~target
        if int(free.sum()) >= visible:
            break
    else:
        targets = targets[:1] * settings.targets
        free = ~targets[0]
    candidates = free.flatten().nonzero().squeeze(1).tolist()
    kept = sorted(candidates, key=lambda _: rng.random())[:visible]
    hidden = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    hidden[kept] = False
    return hidden, torch.stack(targets).flatten(1)


def visible_count(settings: MultiBlockMask, grid: Size) -> int:
    """How many tokens the context has in every crop.

    Raises:
        ValueError: the grid is too small for context and target.
    """
    tokens = grid[0] * grid[1]
    visible = int(tokens * settings.visible + 1e-9)
    largest = (math.sqrt(tokens * settings.target_scale[1]) + 1) ** 2  # sides are rounded
    if visible < 1 or visible + largest > tokens:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} tokens has no room for a context of {visible} and targets of up to "
            f"{int(largest)}: use a larger view, a smaller patch, or other `visible` and `target_scale`"
        )
    return visible


def _size(area: int, aspect: float, grid: Size) -> Size:
    """Height and width of about `area` tokens, at least 1 and at most the grid; aspect is height over width."""
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return min(max(1, height), grid[0]), min(max(1, width), grid[1])


def _place(size: Size, grid: Size, rng: Random) -> Tensor:
    """A block anywhere in the grid: bool [rows, columns]."""
    top, left = (int(rng.random() * (n - side + 1)) for n, side in zip(grid, size, strict=True))
    block = torch.zeros(grid, dtype=torch.bool)
    block[top : top + size[0], left : left + size[1]] = True
    return block


def _uniform(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
