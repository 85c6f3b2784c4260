"""InfoNCE with keys from all processes. Shapes: N rows on this process, M = W * N rows in all, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import rank
from .precision import full_precision, no_autocast


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32."""
    with no_autocast(x):
        return F.normalize(full_precision(x), dim=-1)


def info_nce(query: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Mean over rows of -log softmax(query . keys / temperature) at the row's own key.

    Args:
        query: [N, D] unit rows.
        keys: [M, D] unit rows of all processes in rank order; row r * N + i is the positive of query i on rank r, every
            other one is a negative. The caller chooses whether gradients flow to them (`gather`, `gather_no_grad`).
        temperature: > 0.
    """
    with no_autocast(query):
        logits = full_precision(query) @ full_precision(keys).T / temperature  # [N, M]
        own = torch.arange(len(query), device=query.device) + rank() * len(query)
        return F.cross_entropy(logits, own)
