"""A running mean of the teacher's logits, subtracted before its softmax so that no prototype wins everywhere.

From DINO (arXiv 2104.14294). The mean is that of all processes' rows: sums and counts are added, never means, so that
processes may bring different numbers of rows, or none. Shapes: R rows, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import all_sum_no_grad
from .precision import full_precision, no_autocast


class Center(nn.Module):
    """`value` [K], zero at first, equal on every process.

    Args:
        dim: K.
        momentum: share of the old value that an update keeps.
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))

    @torch.no_grad()
    def softmax(self, logits: Tensor, temperature: float) -> Tensor:
        """softmax((logits - value) / temperature), float32 constants; [..., K] -> [..., K]."""
        with no_autocast(logits):
            return ((full_precision(logits) - self.value) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, total: Tensor, count: int) -> None:
        """Move towards the global mean; after the old value was used, once a micro-batch.

        Args:
            total: [K] sum of this process's logits. Where it is not finite on any process, the centre stays as it is:
                one bad batch must not spoil every later one.
            count: how many rows were summed.
        """
        total = total.to(self.value.dtype)
        sums = all_sum_no_grad(torch.cat((total, total.new_full((1,), count))))  # one collective
        moved = torch.lerp(sums[:-1] / sums[-1], self.value, self.momentum)
        self.value.copy_(torch.where(moved.isfinite().all(), moved, self.value))  # no sync: decided on the device

    def extra_repr(self) -> str:
        return f"{len(self.value)}, momentum={self.momentum}"
