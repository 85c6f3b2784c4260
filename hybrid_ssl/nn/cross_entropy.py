"""Cross-entropy with soft targets, in float32, without keeping log-probabilities.

Because a target sums to one, -sum_k t_k log softmax(s / T)_k = lse(s / T) - <t, s> / T: one number a row has to be
kept instead of K. The same identity sums n teachers first: sum_j CE(t_j, s) = n lse(s / T) - <sum_j t_j, s> / T, so
that a local crop meets the sum of both teachers once. Shapes: R rows, B images, K prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision, no_autocast


def soft_cross_entropy(target: Tensor, logits: Tensor, temperature: float, mass: float = 1.0) -> Tensor:
    """-sum_k target_k log softmax(logits / temperature)_k of each row; [R, K], [R, K] -> float32 [R].

    Args:
        target: constant rows that sum to `mass`.
        logits: before the temperature.
        temperature: > 0.
        mass: what a row of `target` sums to, e.g. the number of teachers added up in it.
    """
    with no_autocast(logits):
        return _SoftCrossEntropy.apply(full_precision(logits), full_precision(target.detach()), temperature, mass)


def across_views(targets: Tensor, logits: Tensor, temperature: float, local_weight: float = 1.0) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and another view of the student (arXiv 2104.14294, eq. 3).

    Args:
        targets: [T, B, K] probabilities of the T teacher views.
        logits: [S, B, K], S >= T; the first T views are the teacher's, and view i never meets target i.
        temperature: of the student.
        local_weight: factor of the student's other, local views, whose pairs are counted as before (DINOv3: 0.5).

    Returns:
        The mean over T * (S - 1) pairs and B images, every pair with equal weight.
    """
    teachers, views = len(targets), len(logits)
    assert views >= max(teachers, 2), "a single view has no other one to predict it"
    total, terms = targets.sum(0), []  # [B, K]
    for view, own_logits in enumerate(logits.unbind(0)):
        met = teachers - (view < teachers)
        if met:
            target = total - targets[view] if view < teachers else total
            term = soft_cross_entropy(target, own_logits, temperature, mass=met).mean()
            terms.append(term if view < teachers else term * local_weight)
    return torch.stack(terms).sum() / (teachers * (views - 1))


def hard_cross_entropy(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy with class numbers, and the share of rows whose largest logit is right; both float32.

    Args:
        logits: [R, K].
        classes: [R] int64 in 0 .. K-1.
    """
    with no_autocast(logits):
        loss = F.cross_entropy(full_precision(logits), classes)
    with torch.no_grad():
        return loss, (logits.argmax(dim=-1) == classes).to(loss.dtype).mean()


def entropy_share(probabilities: Tensor) -> Tensor:
    """Mean entropy of the rows over its maximum ln K: 0 one-hot, 1 uniform. No rows: 0. [..., K] -> scalar."""
    rows = probabilities.numel() // probabilities.shape[-1]
    entropy = torch.special.entr(probabilities).sum() / max(1, rows)
    return entropy / math.log(max(2, probabilities.shape[-1]))


class _SoftCrossEntropy(torch.autograd.Function):
    """Keeps logits and targets, which exist anyway; one temporary [R, K] in either direction."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, temperature: float, mass: float) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.temperature, ctx.mass = temperature, mass
        scaled = logits / temperature
        lse = scaled.logsumexp(dim=-1)
        return mass * lse - scaled.mul_(target).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target = ctx.saved_tensors
        step = grads[0].unsqueeze(-1) / ctx.temperature
        softmax = (logits / ctx.temperature).softmax(dim=-1)
        return softmax.mul_(step * ctx.mass).addcmul_(target, step, value=-1), None, None, None
