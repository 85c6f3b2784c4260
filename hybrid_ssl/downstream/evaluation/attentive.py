"""Attentive probe: a learned query asks all patch tokens, and a linear layer classifies what it gets.

As in V-JEPA (arXiv 2404.08471) and CAPI (2502.08769): encoders without class token, or whose class token was trained
for nothing, keep what they know in the patch tokens, and a mean over them loses it. One cross-attention with several
heads, LayerNorm before and after it, AdamW, cosine schedule; V-JEPA's MLP behind the attention is left out, as in
CAPI. The learning rate is chosen on held-out training images.

One query that is the same for all images needs no keys and values of single tokens: q . (K x) = (K^T q) . x, and a
weighted sum of V x is V times the weighted sum of x. That is the same function for N * H * D instead of N * D * D
multiplications. The LayerNorm's scale and shift are part of K and V, and a bias of the keys would cancel in the
softmax.

Shapes: b images, N patches, D width, H attention heads, d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ...optim import OptimizerSettings
from .feed import Feed
from .heads import Head, Trial, compete, seeded
from .settings import AttentiveSettings
from .work import Bench, Found, accuracies, held_out

_NORMED = "tokens, normed"  # once for all heads that learn from a batch


class AttentivePool(nn.Module):
    """Cross-attention with one learned query, then a linear layer."""

    def __init__(self, dim: int, heads: int, classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(heads, dim // heads))
        self.key = nn.Parameter(dim**-0.5 * torch.randn(heads, dim // heads, dim))
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        if _NORMED not in features:
            features[_NORMED] = layer_norm(features["tokens"], features["tokens"].shape[-1:])
        logits: Tensor = self.head(self.norm(self.proj(self.pool(features[_NORMED]))))
        return logits

    def pool(self, x: Tensor) -> Tensor:
        """Values that the query gets: [b, N, D] -> [b, D]."""
        heads, width = self.query.shape
        asked = torch.einsum("hd,hdc->ch", self.query, self.key) * width**-0.5  # [D, H]
        weights = (x @ asked).softmax(1)  # [b, N, H]
        seen = weights.transpose(1, 2) @ x  # [b, H, D]
        value = self.value.weight.view(heads, width, -1)
        return torch.einsum("bhc,hdc->bhd", seen, value).flatten(1) + self.value.bias


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
