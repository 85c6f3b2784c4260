"""Sinkhorn-Knopp: targets in which every row is a distribution and all prototypes are used about equally.

From SwAV (arXiv 2006.09882), used by DINOv2 and MSN as well. Worked in the log domain, in float32: exp(logit / 0.04)
overflows above 3.5, and a prototype whose column underflows would give 0 / 0. The published constants (a first division
by the sum, 1 / K, 1 / B) cancel in the next division and are left out. Shapes: R rows on this process, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .distributed import all_max_no_grad, all_sum_no_grad
from .precision import full_precision, no_autocast


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """[R, K] logits -> [R, K] float32 targets; each row sums to 1, prototypes are balanced over all processes' rows.

    Args:
        logits: processes may hold different numbers of rows, or none. Rows of a queue are put behind the batch's, and
            dropped from the result.
        temperature: > 0 (the papers' epsilon).
        iterations: >= 1; more balance the prototypes better.
    """
    assert iterations >= 1, iterations
    with no_autocast(logits):
        log_q = full_precision(logits) / temperature
        for _ in range(iterations):
            log_q -= _global_logsumexp(log_q)  # each prototype gets the same mass
            log_q -= log_q.logsumexp(dim=1, keepdim=True)  # last, so that rows sum to 1 exactly
        return log_q.exp_()


def _global_logsumexp(x: Tensor) -> Tensor:
    """Log of the sum of exp over the rows of all processes; [R, K] -> [K]."""
    top = x.amax(dim=0) if len(x) else x.new_full(x.shape[1:], torch.finfo(x.dtype).min)
    top = all_max_no_grad(top)
    return top + all_sum_no_grad((x - top).exp_().sum(dim=0)).log()
