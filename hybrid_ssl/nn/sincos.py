"""Fixed two-dimensional sine-cosine positions, in the layout of MAE (arXiv 2111.06377, appendix A.1).

A position u on one axis becomes [sin(u w), cos(u w)] with w_k = 10000 ** (-k / (D / 4)), k = 0 .. D/4 - 1. The FIRST
half of the D values encodes the column, the second the row; weights are interchangeable with MAE's only in this order.
Positions are counted in tokens, not scaled to the grid, and grids may be of any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(dim: int, grid: tuple[int, int], cls: bool = False) -> Tensor:
    """Positions of all tokens, row by row: float32 [N, dim], or [1 + N, dim] with a zero vector for the class token."""
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    table = torch.cat([_sincos_1d(dim // 2, columns.flatten()), _sincos_1d(dim // 2, rows.flatten())], dim=1)
    if cls:
        table = torch.cat([table.new_zeros(1, dim), table])
    return table.float()


def _sincos_1d(dim: int, position: Tensor) -> Tensor:
    """[N] -> float64 [N, dim]."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))  # float64, rounded once, as MAE's
    angle = position.to(torch.float64)[:, None] * omega  # [N, dim / 2]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
