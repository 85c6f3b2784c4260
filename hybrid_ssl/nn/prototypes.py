"""Prototypes: cosine logits against learned directions (a weight-normed linear layer without bias).

Weight norm writes row k of the matrix as g_k * v_k / ||v_k||. Here v is a plain parameter that is normalised in the
forward pass, so the module can be deep-copied, sharded and averaged like any other. With g frozen at 1 there is no g
at all. Shapes: R rows, D width, K prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import full_precision, no_autocast


class Prototypes(nn.Module):
    """[R, D] -> float32 logits [R, K]; with unit rows in, they are cosines times g.

    Args:
        dim: D.
        count: K.
        free_scale: learn g, shaped [K, 1] and 1 at first (2-D, so that weight decay applies as in the official code).
    """

    def __init__(self, dim: int, count: int, free_scale: bool = False) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)  # nn.Linear's; only the direction matters
        self.weight = nn.Parameter(torch.empty(count, dim).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.ones(count, 1)) if free_scale else None

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):  # float32: a bf16 cosine divided by a temperature of 0.04 is off by 0.1
            rows = unit_rows(full_precision(self.weight))
            if self.scale is not None:
                rows = rows * full_precision(self.scale)
            return F.linear(x.to(rows.dtype), rows)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, free_scale={self.scale is not None}"


def unit_rows(weight: Tensor) -> Tensor:
    """Rows of length 1. As `F.normalize`, with an analytic backward pass that keeps one matrix instead of three."""
    return _UnitRows.apply(weight)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12).reciprocal_()  # [K, 1]
        rows = weight * inverse
        ctx.save_for_backward(rows, inverse)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rows, inverse = ctx.saved_tensors
        (grad,) = grads
        along = (grad * rows).sum(dim=1, keepdim=True)  # the part that would only change the length
        return torch.addcmul(grad, rows, along, value=-1).mul_(inverse)
