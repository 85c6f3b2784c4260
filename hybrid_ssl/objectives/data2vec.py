"""data2vec for images: predict, at hidden patches, what a teacher's last blocks make of the whole image.

Source: Baevski et al., "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language",
arXiv 2202.03555. Written from the paper and a fact sheet.

    target = norm(mean over the last K blocks of norm(output of the block)),  norm without scale and shift
    loss   = smooth L1 (beta 2) between target and one linear layer on the student's token, at hidden patches

The student sees the image with mask tokens, the teacher the whole image. A block's output is the residual stream after
it, *without* the encoder's last norm. The order of norms and mean matters: each block is normalised first, or the one
with the largest values would decide alone. The mean is over the hidden patches of all processes together, so an image
with more hidden patches weighs more, as published. Hidden rows are picked before the norms, which act on each token by
itself. The teacher moves after the step (`teacher.offset: 0`); the released runs keep its momentum constant.

Works on Swin with at most as many blocks as its last stage has. Features may collapse: `target_spread` shows it, the
deviation of a target value over the hidden patches, which goes to 0.
Shapes: B images (V * B with several crops), N patches, n hidden ones in the micro-batch, D encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..nn.distributed import ragged_mean
from ..nn.precision import for_weight, full_precision, no_autocast
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings


class Data2VecSettings(ObjectiveSettings):
    """Defaults: the released ViT-B's."""

    view: str = "plain"
    mask: str = "block"
    """paper: blocks, 60 % hidden"""
    layers: int = Field(6, ge=1)
    """K, blocks of the teacher that are averaged, counted from its end"""
    beta: float = Field(2.0, gt=0)
    """where smooth L1 turns from square to straight"""


class Data2Vec(Objective):
    """Regress averaged teacher layers at hidden patches."""

    Config = Data2VecSettings

    def __init__(self, cfg: Data2VecSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        available = encoder.depth if encoder.layers is None else encoder.layers
        if cfg.layers > available:
            raise ValueError(
                f"layers: {cfg.layers} blocks are to be averaged, but the encoder has {available} whose outputs are as "
                f"many tokens as its last ones (a Swin's last stage; other families than ViT and Swin: none)"
                + (f"; set layers to {available} or less" if available else "; use a timm ViT or Swin")
            )
        self.masked = Forward("student", cfg.view, cfg.mask)
        self.whole = Forward("teacher", cfg.view, layers=cfg.layers)
        self.needs = (self.masked, self.whole)
        self.head = nn.Linear(encoder.dim, encoder.dim)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: smooth L1; `target_spread`, `spread`: deviation of targets and predictions over hidden patches."""
        rows = batch.hidden_rows(self.cfg.mask)  # [n]
        outputs = tokens[self.whole].layers[-self.cfg.layers :]
        target = average_layers([x.flatten(0, 1).index_select(0, rows) for x in outputs])  # [n, D]
        hidden = tokens[self.masked].patches.flatten(0, 1).index_select(0, rows)
        predicted = full_precision(self.head(for_weight(hidden, self.head.weight)))  # [n, D]
        each = F.smooth_l1_loss(predicted, target, reduction="none", beta=self.cfg.beta).mean(1)  # [n]
        return {
            "loss": ragged_mean(each),
            "target_spread": _spread(target),
            "spread": _spread(predicted.detach()),
        }


@torch.no_grad()
def average_layers(outputs: Sequence[Tensor]) -> Tensor:
    """data2vec's target from the outputs of K blocks: each normalised, their mean, normalised; [..., D] each."""
    with no_autocast(outputs[0]):
        normed = (F.layer_norm(full_precision(x), x.shape[-1:]) for x in outputs)
        total = next(normed)
        for x in normed:  # a running sum instead of K tensors
            total = total + x
        return F.layer_norm(total / len(outputs), total.shape[-1:])


def _spread(x: Tensor) -> Tensor:
    """Mean over values of the deviation over rows: [n, D] -> scalar, 0 without rows."""
    return (x - x.sum(0) / max(1, len(x))).square().mean(1).sum().div(max(1, len(x))).sqrt()
