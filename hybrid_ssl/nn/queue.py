"""A ring of the newest rows of all processes, e.g. MoCo's keys or SwAV's embeddings. Shapes: n rows, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import gather_no_grad


class Queue(nn.Module):
    """`size` rows of width `dim`; content, position and filling are buffers, equal on every process.

    It starts with random unit rows (MoCo, arXiv 1911.05722); `filled` says how many real ones it holds.
    """

    rows: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def read(self) -> Tensor:
        """A copy [size, dim]: a graph that keeps the rows must not see the next `push`."""
        return self.rows.clone()

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Replace the oldest rows by those of all processes, in rank order; [n, D] with the same n on each.

        Called after the loss has read the queue, so that no row is its own negative. Any n will do: the ring wraps,
        and of more than `size` rows the last ones stay. A row that is not finite is not taken: one bad image must not
        spoil every batch until the queue has turned over.
        """
        size = len(self.rows)
        new = gather_no_grad(rows).to(self.rows.dtype)[-size:]
        slots = (self.pointer + torch.arange(len(new), device=new.device)) % size  # no sync: stays on the device
        new = torch.where(new.isfinite().all(dim=1, keepdim=True), new, self.rows[slots])
        self.rows.index_copy_(0, slots, new)
        self.pointer.copy_((self.pointer + len(new)) % size)
        self.filled.copy_((self.filled + len(new)).clamp(max=size))

    def extra_repr(self) -> str:
        return f"{len(self.rows)}, {self.rows.shape[1]}"
