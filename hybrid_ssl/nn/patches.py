"""Images as rows of patches and back, and the pixel statistics of a patch.

Two orders of the values inside a patch are in use and their heads are not interchangeable: "p q c" (channel fastest:
MAE) and "c p q" (channel slowest: SimMIM, whose convolution and PixelShuffle write it). Shapes: B images, C channels,
p pixels of a patch's side, N patches in row-major order, L = C * p * p values of a patch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .precision import full_precision

PatchOrder = Literal["p q c", "c p q"]


def patchify(images: Tensor, size: int, order: PatchOrder) -> Tensor:
    """[B, C, H, W] -> [B, N, L]. H and W are multiples of `size`."""
    b, c, h, w = images.shape
    if h % size or w % size:
        raise ValueError(f"images of {h} x {w} pixels cannot be cut into patches of {size}; use multiples of {size}")
    x = images.reshape(b, c, h // size, size, w // size, size)  # [B, C, rows, p, columns, q]
    x = x.permute(0, 2, 4, 3, 5, 1) if order == "p q c" else x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // size) * (w // size), c * size * size)


def unpatchify(patches: Tensor, grid: tuple[int, int], size: int, order: PatchOrder) -> Tensor:
    """The inverse of `patchify`: [B, N, L] -> [B, C, H, W]."""
    b, rows, columns = patches.shape[0], *grid
    if order == "p q c":
        x = patches.reshape(b, rows, columns, size, size, -1).permute(0, 5, 1, 3, 2, 4)
    else:
        x = patches.reshape(b, rows, columns, -1, size, size).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, x.shape[1], rows * size, columns * size)  # from [B, C, rows, p, columns, q]


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all values of each patch, channels jointly: [..., L] -> two [..., 1].

    The variance is the unbiased one plus 1e-6, as in MAE; the biased one would scale targets by sqrt(768 / 767). At
    least float32: in bf16 a nearly flat patch has no meaningful variance.
    """
    variance, mean = torch.var_mean(full_precision(patches), dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[B, N, L] at [B, n] -> [B, n, L]."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
