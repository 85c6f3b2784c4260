"""Losses with negatives: InfoNCE against keys of all processes or of a queue, NT-Xent, and the supervised form.

Softmax and logsumexp run in float32: exp(cosine / 0.07) leaves fp16. A row never meets itself, and its positive stays
in the denominator (without it the loss is another one, DCL). Shapes: N images on this process, M = W * N in all,
R rows on this process (N images in V views), D width, Q keys in a queue.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather, gather_no_grad, rank
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


def queue_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean over rows of -log softmax([query . key, query . negatives] / temperature) at the first (arXiv 1911.05722).

    Args:
        query: [N, D] unit rows.
        key: [N, D] unit rows, the positives; constants.
        negatives: [Q, D] unit rows, as they were before this step's keys joined them; constants. A queue that already
            held `key` would make every positive a negative as well.
        temperature: > 0.
    """
    with no_autocast(query):
        query, key, negatives = (full_precision(x) for x in (query, key.detach(), negatives.detach()))
        positive = (query * key).sum(dim=1) / temperature  # [N]
        others = (query @ negatives.T / temperature).logsumexp(dim=1)  # [N]
        return F.softplus(others - positive).mean()  # log(e^p + e^o) - p, without joining the two


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (arXiv 2002.05709, eq. 1): each row finds its other view among 2M - 1 rows; mean over 2N rows.

    The official TensorFlow code adds the means of both views instead, which is twice this number.

    Args:
        first, second: [N, D] of any length (cosines are compared); row i of both is the same image. Gradients flow to
            the rows of all processes.
        temperature: > 0.
    """
    with no_autocast(first):
        rows = torch.stack((unit(first), unit(second)))  # [2, N, D]
        images = rows.shape[1]
        everyone = gather(rows.transpose(0, 1).contiguous()).transpose(0, 1).flatten(0, 1)  # [2M, D] view-major
        logits = rows.flatten(0, 1) @ everyone.T / temperature  # [2N, 2M]
        own = torch.arange(images, device=rows.device) + rank() * images
        itself = torch.cat((own, own + len(everyone) // 2))  # column of each row itself
        logits.scatter_(1, itself.unsqueeze(1), -torch.inf)
        positive = (rows[0] * rows[1]).sum(dim=1) / temperature  # [N], the same for both views
        return logits.logsumexp(dim=1).mean() - positive.mean()


def supcon(rows: Tensor, labels: Tensor, temperature: float, form: Literal["out", "in"] = "out") -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2 and 3); mean over all rows.

    Positives of a row are the other rows with its label, on any process. `out` averages their log-probabilities, `in`
    takes the log of their average probability (never more than `out`, and weaker: its gradient prefers positives that
    are near already). The official code multiplies by temperature / 0.07.

    Args:
        rows: [R, D] unit rows, all views of all images, in any order; gradients flow to all processes.
        labels: [R] integers. A row without positives counts as 0.
        temperature: > 0.
        form: where the sum over positives stands.
    """
    with no_autocast(rows):
        rows = full_precision(rows)
        logits = rows @ gather(rows).T / temperature  # [R, W*R]
        itself = (torch.arange(len(rows), device=rows.device) + rank() * len(rows)).unsqueeze(1)
        logits.scatter_(1, itself, -torch.inf)
        positive = (labels.unsqueeze(1) == gather_no_grad(labels)).scatter_(1, itself, False)  # [R, W*R]
        count = positive.sum(dim=1).to(logits.dtype)  # before the log, which makes integers float32
        least = torch.finfo(logits.dtype).min  # finite: a row without positives must give 0, not NaN, backwards too
        if form == "out":
            mean = logits.masked_fill(~positive, 0).sum(dim=1) / count.clamp(min=1)
        else:
            mean = logits.masked_fill(~positive, least).logsumexp(dim=1) - count.clamp(min=1).log()
        return torch.where(count > 0, logits.logsumexp(dim=1) - mean, 0).mean()
