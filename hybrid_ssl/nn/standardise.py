"""Targets brought to mean 0 and deviation 1 by running statistics, so that no few values of a feature decide a loss.

Features of large encoders have some values that are far larger than all others. The statistics are those of all
processes' rows (sums and counts are added); the first rows count alone, later ones with 1 - momentum at least.
Shapes: R rows, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import all_sum_no_grad
from .precision import full_precision, no_autocast


class RunningStandardise(nn.Module):
    """`mean` and `var` [E], updated by every call in training, equal on every process.

    Args:
        dim: E.
        momentum: share of the old statistics that an update keeps, once there are enough.
    """

    mean: Tensor
    var: Tensor
    updates: Tensor

    def __init__(self, dim: int, momentum: float = 0.99, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Constants [..., E] -> [..., E] in float32; in training after these rows were counted."""
        with no_autocast(x):
            x = full_precision(x)
            if self.training:
                self._update(x.flatten(0, -2).to(self.mean.dtype))
            return (x - self.mean) * (self.var + self.eps).rsqrt()

    def _update(self, rows: Tensor) -> None:
        """rows: [R, E]. Where they are not finite on any process, the statistics stay as they are."""
        centred = rows - self.mean  # the variance is a difference of squares: small ones, once the mean is near
        sums = torch.cat((centred.sum(0), centred.square().sum(0), rows.new_full((1,), len(rows))))
        sums = all_sum_no_grad(sums)  # one collective
        shift, square = (sums[:-1] / sums[-1]).chunk(2)
        var = square - shift.square()
        new = (1 / (self.updates + 1)).clamp(min=1 - self.momentum)  # a plain mean at first
        ok = sums.isfinite().all()  # no sync: decided on the device
        self.var.copy_(torch.where(ok, self.var.lerp(var + (1 - new) * shift.square(), new), self.var))
        self.mean.copy_(torch.where(ok, self.mean + new * shift, self.mean))
        self.updates.add_(ok)

    def extra_repr(self) -> str:
        return f"{len(self.mean)}, momentum={self.momentum}"
