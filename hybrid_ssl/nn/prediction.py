"""Losses without negatives: one view's prediction against the other view's embedding, by cosine.

BYOL and SimSiam differ by constants only, and those decide what a learning rate means: the gradient of the first is
four times that of the second. Targets never carry a gradient; without that both collapse. Shapes: N rows, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision, no_autocast

Pair = tuple[Tensor, Tensor]
"""of the first view and of the second"""


def mean_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine of rows [N, D] of any length; no gradient to `target`."""
    with no_autocast(prediction):  # float32: squares of unnormalised rows overflow in fp16
        return F.cosine_similarity(full_precision(prediction), full_precision(target.detach()), dim=-1).mean()


def byol_loss(predictions: Pair, targets: Pair) -> Tensor:
    """|p1 - t2|^2 + |p2 - t1|^2 of unit rows = 4 - 2 cos(p1, t2) - 2 cos(p2, t1) (arXiv 2006.07733); 0 to 8."""
    return 4 - 2 * mean_cosine(predictions[0], targets[1]) - 2 * mean_cosine(predictions[1], targets[0])


def simsiam_loss(predictions: Pair, embeddings: Pair) -> Tensor:
    """-(cos(p1, z2) + cos(p2, z1)) / 2 (arXiv 2011.10566, eq. 4); -1 to 1. The z are constants here."""
    return -(mean_cosine(predictions[0], embeddings[1]) + mean_cosine(predictions[1], embeddings[0])) / 2


@torch.no_grad()
def spread(rows: Tensor) -> Tensor:
    """sqrt(D) * mean_d std of the unit rows: about 1 when they differ, 0 when all are one (arXiv 2011.10566, fig. 2).

    Over this process's rows; a single row has spread 0.
    """
    with no_autocast(rows):
        directions = F.normalize(full_precision(rows), dim=-1)
        return directions.std(dim=0, correction=0).mean() * rows.shape[-1] ** 0.5
