"""Histograms of oriented gradients as regression targets, in plain tensor operations on any device.

After MaskFeat (arXiv 2112.09133, section 3.2); the idea is Dalal and Triggs' (CVPR 2005). Each channel by itself: Sobel
gradients of the reflected image, their length weighed by a Gaussian window of two cells, hard assignment to unsigned
orientations, sums over cells, and unit length over the bins of each cell. The angle is counted from the *y* axis, so
that an upright edge falls into the middle bin: other implementations count from the x axis, have one cell a patch or
leave the window out, and are other targets.

The bins are summed one after the other: no [B, C, bins, H, W] buffer, no `scatter_add`, whose order on a GPU is random.
Shapes: B images, C channels, N patches in row-major order, k cells along a patch's side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision, no_autocast


def hog(images: Tensor, cell: int = 8, bins: int = 9) -> Tensor:
    """Histograms of all cells, each of length 1 (or 0 where a cell is flat).

    Args:
        images: [B, C, H, W]; H and W are multiples of `cell`. Gradients scale with the channels' normalisation.
        cell: side of a cell in pixels.
        bins: orientations between 0 and 180 degrees.

    Returns:
        float32 (float64 for float64 images) [B, C, bins, H / cell, W / cell].
    """
    with no_autocast(images):
        across, down = sobel(full_precision(images))
        length = torch.hypot(across, down) * window(2 * cell, across)
        # -180 and 180 degrees, and opposite gradients, meet in one bin by the remainder
        which = (torch.atan2(across, down) * (bins / math.pi)).floor().remainder(bins)
        area = cell * cell
        cells = [F.avg_pool2d(torch.where(which == b, length, 0.0), cell) * area for b in range(bins)]
        return F.normalize(torch.stack(cells, dim=2), dim=2, eps=1e-12)


def hog_patches(images: Tensor, patch: int, cell: int = 8, bins: int = 9) -> Tensor:
    """The histograms of each patch, in order (channel, bin, cell row, cell column): [B, N, C * bins * k * k].

    Raises:
        ValueError: the patch is no multiple of the cell.
    """
    if patch % cell:
        near = [n for n in (8, 4, 2, 1) if patch % n == 0]
        raise ValueError(f"a patch of {patch} pixels has no whole number of {cell}-pixel cells; cell: {near[0]} fits")
    k = patch // cell
    x = hog(images, cell, bins).unflatten(4, (-1, k)).unflatten(3, (-1, k))  # [B, C, bins, rows, k, columns, k]
    return x.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to the right neighbour's disadvantage, and downwards likewise (left minus right, upper minus lower)."""
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    upright = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]  # [B, C, H, W + 2]
    level = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]  # [B, C, H + 2, W]
    return upright[..., :-2] - upright[..., 2:], level[..., :-2, :] - level[..., 2:, :]


def window(side: int, like: Tensor) -> Tensor:
    """A Gaussian of deviation side / 2 around the centre of each `side` x `side` square, summing to 1 in it: [H, W]."""
    height, width = like.shape[-2:]
    place = torch.arange(side, dtype=like.dtype, device=like.device) - (side - 1) / 2
    bell = (-0.5 * (place / (side / 2)).square()).exp()
    bell = bell / bell.sum()
    rows, columns = (bell.repeat(-(-n // side))[:n] for n in (height, width))  # a last half square where n is odd cells
    return rows.unsqueeze(1) * columns
