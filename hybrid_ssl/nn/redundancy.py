"""Losses on correlations between dimensions, over the global batch: Barlow Twins and VICReg.

All statistics are those of all processes' rows, and gradients reach every process: a loss that is the same number
everywhere, whose gradients come W times and are divided by W. Both need |A^T B|^2 only as a sum, never the matrix, and
|A^T B|^2 = <A A^T, B B^T>: with fewer rows than dimensions the small Gram matrices are cheaper, and nothing of size
D x D is kept or sent (268 MB at D = 8192). Shapes: N rows on this process, M = W * N in all, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batchnorm import SyncBatchNorm1d
from .distributed import all_sum, gather, world_size
from .precision import full_precision, no_autocast


class BarlowTerms(NamedTuple):
    """Sums over the cross-correlation C of the two views' dimensions (arXiv 2103.03230, eq. 1)."""

    on_diagonal: Tensor
    """sum_i (C_ii - 1)^2: D for constant or unrelated views, 0 for equal ones"""
    off_diagonal: Tensor
    """sum_{i != j} C_ij^2, to be multiplied by lambda"""


class VICRegTerms(NamedTuple):
    """As in the code that gives the published results (arXiv 2105.04906), before the weights 25, 25 and 1."""

    invariance: Tensor
    """squared distance of the views, mean over images and dimensions (the paper's text sums over dimensions)"""
    variance: Tensor
    """mean over views and dimensions of max(0, 1 - std)"""
    covariance: Tensor
    """sum over both views of sum_{i != j} Cov_ij^2 / D"""


def barlow_twins_terms(first: Tensor, second: Tensor) -> BarlowTerms:
    """Both views [N, D] are standardised over the global batch (biased variance, eps 1e-5) first."""
    with no_autocast(first):
        standardise = SyncBatchNorm1d(first.shape[1], affine=False)
        first, second = standardise(first), standardise(second)
        rows = world_size() * len(first)
        diagonal = all_sum((first * second).sum(dim=0)) / rows  # [D]
        total = _squared_product(first, second) / rows**2
        return BarlowTerms((diagonal - 1).square().sum(), total - diagonal.square().sum())


def vicreg_terms(first: Tensor, second: Tensor) -> VICRegTerms:
    """Of two views [N, D], as the projector gives them: neither normalised nor standardised."""
    with no_autocast(first):
        first, second = full_precision(first), full_precision(second)
        invariance = (first - second).square().mean()  # of this process: DDP takes the mean over processes
        spreads = [_spread(view) for view in (first, second)]
        variances, covariances = zip(*spreads, strict=True)
        return VICRegTerms(invariance, torch.stack(variances).mean(), torch.stack(covariances).sum())


def _spread(view: Tensor) -> tuple[Tensor, Tensor]:
    """mean_d max(0, 1 - std_d) and sum_{i != j} Cov_ij^2 / D of one view, unbiased."""
    rows, dim = world_size() * len(view), view.shape[1]
    view = view - all_sum(view.sum(dim=0)) / rows
    variance = all_sum(view.square().sum(dim=0)) / (rows - 1)  # [D], the covariance's diagonal
    hinge = (1 - (variance + 1e-4).sqrt()).clamp(min=0).mean()  # inside the root: its slope at 0 is infinite
    off_diagonal = _squared_product(view, view) / (rows - 1) ** 2 - variance.square().sum()
    return hinge, off_diagonal / dim


def _squared_product(a: Tensor, b: Tensor) -> Tensor:
    """|A^T B|^2, summed over all D x D entries, of all processes' rows A and B; [N, D] twice -> scalar."""
    rows, dim = world_size() * len(a), a.shape[1]
    if (1 if a is b else 2) * rows >= dim:
        return all_sum(a.T @ b).square().sum()
    gram = a @ gather(a).T  # [N, M]
    return all_sum((gram * (gram if a is b else b @ gather(b).T)).sum())
