"""Prototypes: cosine logits against learned directions (a weight-normed linear layer without bias).

Weight norm writes row k of the matrix as g_k * v_k / ||v_k||. Here v is a plain parameter that is normalised in the
forward pass, so the module can be deep-copied, sharded and averaged like any other. With g frozen at 1 there is no g
at all. DINO has few rows and 65,536 prototypes: there the logits are divided by the lengths instead of the weights,
which takes half the time and leaves no second matrix [K, D]. Shapes: R rows, D width, K prototypes.
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
            weight = full_precision(self.weight)
            x = x.to(weight.dtype)
            if x.ndim == 2 and len(x) < weight.shape[1]:  # [R, K] is smaller than [K, D]
                logits = _NormedLogits.apply(x, weight)
                return logits if self.scale is None else logits * full_precision(self.scale).squeeze(1)
            rows = unit_rows(weight)
            return F.linear(x, rows if self.scale is None else rows * full_precision(self.scale))

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


class _NormedLogits(torch.autograd.Function):
    """x @ unit_rows(weight).T, scaled after the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        inverse = torch.linalg.vector_norm(weight, dim=1).clamp_min(1e-12).reciprocal_()  # [K]
        logits = F.linear(x, weight).mul_(inverse)  # [R, K]
        ctx.save_for_backward(x, weight, inverse, logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, inverse, logits = ctx.saved_tensors
        (grad,) = grads
        along = (grad * logits).sum(dim=0) * inverse.square()  # [K], the part that would only change the length
        scaled = grad * inverse
        return scaled @ weight, (scaled.T @ x).addcmul_(weight, along.unsqueeze(1), value=-1)
