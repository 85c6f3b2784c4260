"""KoLeo: every feature is pushed away from its nearest neighbour in the batch, which spreads them over the sphere.

The Kozachenko-Leonenko estimate of entropy (Sablayrolles et al., arXiv 1806.03198), as DINOv2 uses it (arXiv
2304.07193). Gradients reach both ends of a pair; the choice of the neighbour has none. Two crops of an image must not
stand in one call: each would flee from the very feature that it is to agree with. Shapes: R rows, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather, rank
from .precision import full_precision, no_autocast

Among = Literal["process", "all"]
"""whose rows are neighbours: those of this process (DINOv2; the loss then depends on the number of processes), or of
all"""

_EPS = 1e-8  # published, twice: in the difference and in the logarithm
_SAME = 1e-4  # nearer rows are one image twice: the direction between them is rounding, its gradient would be 1e8


def koleo(x: Tensor, among: Among = "process") -> Tensor:
    """-mean_i log(|x_i - nearest(x_i)| + 1e-8) of the normalised rows, a float32 scalar.

    Args:
        x: [R, D] features of different images; R is equal on all processes.
        among: where neighbours are looked for.

    Raises:
        ValueError: there is one row and so no neighbour.
    """
    with no_autocast(x):
        rows = F.normalize(full_precision(x), dim=-1, eps=_EPS)
        pool, first = (gather(rows), rank() * len(rows)) if among == "all" else (rows, 0)  # [M, D]
        if len(pool) < 2:
            raise ValueError(
                "KoLeo needs a neighbour, but the micro-batch has one image: set run.micro_batch to 2 or more"
            )
        distance = F.pairwise_distance(rows, pool[_nearest(rows.detach(), pool.detach(), first)], eps=_EPS)  # [R]
        distance = torch.where(distance < _SAME, distance.detach(), distance)
        return -(distance + _EPS).log().mean()


def _nearest(rows: Tensor, pool: Tensor, first: int) -> Tensor:
    """Numbers in `pool` [M, D] of the rows' nearest others; row i is itself number `first + i`. [R] int64."""
    similarity = rows @ pool.T  # [R, M]
    similarity.diagonal(first).fill_(-2)  # below every cosine, so that of two equal rows neither finds itself
    return similarity.argmax(dim=1)
