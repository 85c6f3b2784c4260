"""Swapped prediction: from each crop, predict the balanced cluster assignment ("code") of another crop of the image.

From SwAV (arXiv 2006.09882). Codes are made by Sinkhorn for each target crop by itself; rows of a queue take part in
the balancing, with the current prototypes' logits, and are dropped afterwards. Shapes: T target crops, S crops in all
(the target crops first), B images and Q queued rows on this process, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cross_entropy import across_views
from .sinkhorn import sinkhorn


@torch.no_grad()
def balanced_codes(logits: Tensor, queued: Tensor | None = None, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Targets [T, B, K], rows that sum to 1 and use the prototypes about equally over all processes.

    Args:
        logits: [T, B, K] cosines with the prototypes.
        queued: [T, Q, K] of earlier images of the same crop, each process its own share; None: the batch alone.
        epsilon: temperature of the assignment.
        iterations: of Sinkhorn.
    """
    images = logits.shape[1]
    joined = logits if queued is None else torch.cat((logits, queued), dim=1)  # [T, B + Q, K]
    return torch.stack([sinkhorn(crop, epsilon, iterations)[:images] for crop in joined])


def swav_loss(
    logits: Tensor,
    targets: int = 2,
    queued: Tensor | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all pairs of a target crop and another crop, and the codes [T, B, K].

    Args:
        logits: [S, B, K] cosines of unit embeddings with unit prototypes, target crops first.
        targets: T.
        queued, epsilon, iterations: see `balanced_codes`.
        temperature: of the prediction.
    """
    codes = balanced_codes(logits[:targets].detach(), queued, epsilon, iterations)
    return across_views(codes, logits, temperature), codes
