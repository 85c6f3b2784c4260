"""Gram matrices of patch features: how alike the patches of an image are to each other, whatever the features are.

From DINOv3 (arXiv 2508.10104). Two encoders of different widths can be compared, since only [N, N] matrices meet.
Shapes: R images, N patches on a grid of (rows, columns), D and E widths.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision, no_autocast


def gram_loss(student: Tensor, target: Tensor) -> Tensor:
    """Mean over images and pairs of patches of (cosine of the student's - cosine of the target's) squared.

    Args:
        student: [R, N, D].
        target: [R, N, E], constant.
    """
    with no_autocast(student):  # float32: the differences of late training are about 1e-2, bf16 resolves 4e-3
        return F.mse_loss(cosines(student), cosines(target.detach()))


def cosines(patches: Tensor) -> Tensor:
    """Cosines of all pairs of patches of each image: [R, N, D] -> [R, N, N]."""
    rows = F.normalize(full_precision(patches), dim=-1)
    return rows @ rows.transpose(1, 2)


def resize_patches(patches: Tensor, grid: tuple[int, int], new: tuple[int, int], *, smooth: bool = False) -> Tensor:
    """Patch features on another grid: [R, N, D] -> [R, rows * columns of `new`, D].

    Bicubic without antialiasing, as DINOv3 does it; `smooth`: bilinear with antialiasing: values stay within those of
    the features, and on a coarser grid no patch is left out.
    """
    if grid == new:
        return patches
    with no_autocast(patches):
        maps = full_precision(patches).transpose(1, 2).unflatten(2, grid)  # [R, D, rows, columns]
        mode = "bilinear" if smooth else "bicubic"
        return F.interpolate(maps, size=new, mode=mode, antialias=smooth).flatten(2).transpose(1, 2)
