"""Masks on the encoder's output token grid: random units (MAE, SimMIM) and blocks (BEiT, iBOT). True = hidden.

Random masks hide the same number of units in every crop. MAE (arXiv 2111.06377) keeps int(N (1 - ratio)) tokens,
SimMIM (arXiv 2111.09886) hides ceil(ratio x units) squares of 32 pixels whatever the patch size; both are ceil of the
hidden share. Blocks follow BEiT (arXiv 2106.08254): rectangles of random area and aspect until the target is reached.
We place them with inclusive bounds: I-JEPA's exclusive ones never hide the last row and column. The share of a block
mask, and iBOT's coin (arXiv 2111.07832), are drawn for each crop by itself, or spread evenly over the crops of an
optimizer step (DINOv2, arXiv 2304.07193).

Legend: a grid is (rows, columns) of tokens, N = rows x columns, row-major; `stride` is the side of a token in pixels.
"""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor

from .dirichlet import draw_dirichlet
from .multiblock import visible_count
from .settings import BlockMask, DirichletMask, MaskSettings, MultiBlockMask, RandomMask

_TRIES = 10  # BEiT: a block that was refused ten times ends the mask


def make_mask(
    settings: RandomMask | BlockMask | DirichletMask,
    grid: tuple[int, int],
    stride: int,
    rng: Random,
    active: bool = True,
    share: float | None = None,
) -> Tensor:
    """Draw the mask of one crop: bool [N], True = hidden; all False when not `active` (before the mask's `start`).

    Args:
        share: of a block mask, how much is hidden; None: it is drawn.

    Raises:
        ValueError: if the mask's unit does not fit the grid.
    """
    if isinstance(settings, DirichletMask):
        tokens = grid[0] * grid[1]
        return draw_dirichlet(settings.alpha, tokens - hidden_units(settings.ratio, tokens), grid, rng)
    side = _unit_side(settings, grid, stride)
    rows, columns = grid[0] // side, grid[1] // side
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    if active and isinstance(settings, RandomMask):
        _draw_random(hidden, hidden_units(settings.ratio, rows * columns), rng)
    elif active and isinstance(settings, BlockMask):
        _draw_blocks(hidden, settings, rng, share)
    if side > 1:  # units of several tokens, expanded in row-major order
        hidden = hidden.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return hidden.flatten()


def stratified_shares(settings: BlockMask, crops: int, rng: Random) -> list[float]:
    """Hidden shares of all crops of an optimizer step: int(p x crops) are masked, one share from each of as many equal
    parts of `ratio`; the others are 0. In random order."""
    masked, (low, high) = int(settings.p * crops), settings.ratio
    shares = [
        _uniform(rng, low + (high - low) * i / masked, low + (high - low) * (i + 1) / masked) for i in range(masked)
    ]
    shares += [0.0] * (crops - masked)
    noise = [rng.random() for _ in shares]
    return [shares[i] for i in sorted(range(crops), key=noise.__getitem__)]


def hidden_units(ratio: float, units: int) -> int:
    """How many of `units` a random mask hides: all but int(units x (1 - ratio))."""
    return units - int(units * (1 - ratio) + 1e-9)  # 1e-9: 0.75 of 196 must not depend on the last bit of 1 - ratio


def hidden_count(settings: MaskSettings, grid: tuple[int, int], stride: int) -> int | None:
    """Tokens that the mask hides in every crop; None where the number varies.

    Raises:
        ValueError: if the mask's unit does not fit the grid, or everything or nothing would be hidden.
    """
    if isinstance(settings, MultiBlockMask):
        return grid[0] * grid[1] - visible_count(settings, grid)
    side = 1 if isinstance(settings, DirichletMask) else _unit_side(settings, grid, stride)
    if isinstance(settings, BlockMask):
        return None
    units = (grid[0] // side) * (grid[1] // side)
    hidden = hidden_units(settings.ratio, units)
    if not 0 < hidden < units:
        raise ValueError(
            f"ratio {settings.ratio} of view {settings.view!r} hides {hidden} of {units} units: hidden and visible "
            "ones are needed; use a larger view, a smaller unit or another ratio"
        )
    return hidden * side * side


def _unit_side(settings: RandomMask | BlockMask, grid: tuple[int, int], stride: int) -> int:
    """Tokens along one side of a unit."""
    if settings.unit is None:
        return 1
    if settings.unit % stride:
        raise ValueError(
            f"mask unit {settings.unit} of view {settings.view!r} is not a multiple of the encoder's stride of "
            f"{stride} pixels: use {stride * max(1, round(settings.unit / stride))}"
        )
    side = settings.unit // stride
    if grid[0] % side or grid[1] % side:
        raise ValueError(
            f"view {settings.view!r} of {grid[0] * stride}x{grid[1] * stride} pixels is not a whole number of mask "
            f"units of {settings.unit} pixels: change the view's size or the unit"
        )
    return side


def _draw_random(hidden: Tensor, count: int, rng: Random) -> None:
    noise = [rng.random() for _ in range(hidden.numel())]
    first = sorted(range(len(noise)), key=noise.__getitem__)[:count]
    hidden.view(-1)[first] = True


def _draw_blocks(hidden: Tensor, settings: BlockMask, rng: Random, share: float | None) -> None:
    """Fill `hidden` in place with blocks until the share is reached or no block fits any more."""
    if share is None:
        coin, share = rng.random(), _uniform(rng, settings.ratio[0], settings.ratio[1])
        share = share if coin < settings.p else 0.0
    target, count = share * hidden.numel(), 0  # target stays a float, as in the official code
    while count < target:
        budget = target - count
        if settings.max_tokens is not None:
            budget = min(budget, settings.max_tokens)
        new = _draw_block(hidden, settings, budget, rng)
        if new == 0:
            return
        count += new


def _draw_block(hidden: Tensor, settings: BlockMask, budget: float, rng: Random) -> int:
    """Place one block that hides at most `budget` new tokens; returns how many it hid, 0 when no try was accepted."""
    rows, columns = hidden.shape
    low, high = math.log(settings.aspect[0]), math.log(settings.aspect[1])
    for _ in range(_TRIES):
        area = _uniform(rng, settings.min_tokens, budget)  # below min_tokens the ends swap, as in the official code
        aspect = math.exp(_uniform(rng, low, high))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = int(rng.random() * (rows - height + 1)), int(rng.random() * (columns - width + 1))
        block = hidden[top : top + height, left : left + width]
        new = height * width - int(block.sum())
        if 0 < new <= budget:
            block.fill_(True)
            return new
    return 0


def _uniform(rng: Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
