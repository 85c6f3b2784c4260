"""Attentive probe: a learned query asks all patch tokens, and a linear layer classifies what it gets.

As in I-JEPA's follow-ups, V-JEPA (arXiv 2404.08471) and CAPI (2502.08769): encoders without class token, or whose
class token was trained for nothing, keep what they know in the patch tokens, and a mean over them loses it. One
cross-attention with several heads, LayerNorm before and after it, AdamW, cosine schedule; V-JEPA's MLP behind the
attention is left out, as in CAPI. The learning rate is chosen on held-out training images.

Shapes: b images, N patches, D width, H attention heads, d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...nn.attention import attend
from ...optim import OptimizerSettings
from .feed import Feed
from .heads import Head, Trial, compete, seeded
from .settings import AttentiveSettings
from .work import Bench, Found, accuracies, held_out


class AttentivePool(nn.Module):
    """Cross-attention with one learned query, then a linear layer."""

    def __init__(self, dim: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.out_norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        k, v = (self._split(x) for x in self.kv(self.norm(features["tokens"])).chunk(2, dim=-1))  # [b, H, N, d]
        q = self._split(self.query).expand(len(k), -1, -1, -1)  # [b, H, 1, d]
        pooled = self.proj(attend(q, k, v).transpose(1, 2).flatten(2)).squeeze(1)  # [b, D]
        logits: Tensor = self.head(self.out_norm(pooled))
        return logits

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def heads_of(dim: int, width: int) -> int:
    """Number of attention heads, each of the widest divisor of `dim` up to `width`."""
    return next(dim // d for d in range(min(width, dim), 0, -1) if dim % d == 0)


def run(bench: Bench, cfg: AttentiveSettings, dim: int, trial_of: tuple[Feed, Feed, Feed]) -> Found:
    """Accuracy of the chosen probe.

    Args:
        dim: width of a token.
        trial_of: patch tokens of training images to learn from, of training images as tested, and of test images.
    """
    images = min(cfg.batch_size, len(bench.train.labels))

    def build(lr: float) -> Head:
        pool = seeded(lambda: AttentivePool(dim, heads_of(dim, cfg.head_dim), len(bench.classes)), bench.seed)
        optimizer = OptimizerSettings(lr=lr, lr_per=None, warmup="5%", weight_decay=cfg.weight_decay)
        return Head(pool, optimizer, images, bench.device)

    trial = Trial(*trial_of, cfg.epochs, cfg.batch_size)
    parts = held_out(bench.train.labels, cfg.held_out, bench.seed)
    winner = compete(bench, build, cfg.lrs, trial, parts, "attentive")
    chosen = {"lr": winner.choice, "held_out": winner.share, "epochs": cfg.epochs}
    return Found("top1", accuracies(winner.predicted, bench.test.labels), chosen)
