"""I-JEPA: from one visible part of an image, predict a teacher's features of several large blocks.

Source: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", arXiv
2301.08243. Written from the paper and a fact sheet.

    target = norm(teacher's token of the whole image), at the positions of T blocks; norm without scale and shift
    loss   = smooth L1 (beta 1) between target and predictor(context, positions), mean over blocks, positions and values

The encoder sees the context only (`drop=True`: a ViT; a Swin's windows cannot do without the other patches). The masks
are of kind `multiblock` (`data/multiblock.py`, which says where they differ from the published ones): as all crops have
equally many context and target tokens, nothing is cut off and no count is asked of the device. The teacher moves after
the step, by a momentum that grows *linearly* to 1 (`teacher.momentum`). Published encoders have no class token; with
one, it takes part in the encoder's attention and is not read here.

Features may collapse: `target_spread` shows it, the deviation of a target value over all targets, which goes to 0.
Shapes: R crops (V * B), N patches, T targets of n tokens each, v context tokens, D encoder width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from ..nn.patches import gather_rows
from ..nn.precision import full_precision, no_autocast
from ..nn.predictor import Predictor
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens, visible_rows
from .base import Objective, ObjectiveSettings


class IJEPASettings(ObjectiveSettings):
    """Defaults: the paper's for ViT-B/16."""

    view: str = "plain"
    mask: str = "blocks"
    """a mask of kind multiblock"""
    predictor_dim: int = Field(384, ge=4, multiple_of=4)
    predictor_depth: int = Field(6, ge=1)
    """paper: 6 for ViT-B, 12 for ViT-L and ViT-H"""
    predictor_heads: int = Field(12, ge=1)
    """paper: as many as the encoder has"""

    @model_validator(mode="after")
    def _heads_divide(self) -> IJEPASettings:
        if self.predictor_dim % self.predictor_heads:
            raise ValueError(
                f"predictor_heads {self.predictor_heads} does not divide predictor_dim {self.predictor_dim}"
            )
        return self


class IJEPA(Objective):
    """Predict features of blocks from a context."""

    Config = IJEPASettings

    def __init__(self, cfg: IJEPASettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.context = Forward("student", cfg.view, cfg.mask, drop=True)
        self.whole = Forward("teacher", cfg.view)
        self.needs = (self.context, self.whole)
        self.target_masks = (cfg.mask,)
        self.predictor = Predictor(
            encoder.dim, encoder.grids[cfg.view], cfg.predictor_dim, cfg.predictor_depth, cfg.predictor_heads
        )

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: smooth L1; `target_spread`, `spread`: deviation of targets and predictions over all of them."""
        wanted = target_positions(batch, f"{self.cfg.mask}.targets")  # [R, T, n]
        target = normed_targets(tokens[self.whole].patches, wanted)  # [R, T, n, D]
        context = tokens[self.context].patches  # [R, v, D]
        seen = visible_rows(batch.masks[self.cfg.mask], context.shape[1])  # [R, v]
        predicted = full_precision(self.predictor(context, seen, wanted))  # [R, T, n, D]
        return {
            "loss": F.smooth_l1_loss(predicted, target),
            "target_spread": target.flatten(0, 2).std(0).mean(),
            "spread": predicted.detach().flatten(0, 2).std(0).mean(),
        }


def target_positions(batch: Batch, name: str) -> Tensor:
    """Where the tokens of every target are: int64 [R, T, n]. Their number is known from a shape: nothing waits."""
    rows, targets, patches = batch.masks[name].shape
    return (batch.hidden_rows(name) % patches).view(rows, targets, -1)


@torch.no_grad()
def normed_targets(patches: Tensor, wanted: Tensor) -> Tensor:
    """Teacher's tokens at the targets, each of mean 0 and deviation 1; [R, N, D], [R, T, n] -> [R, T, n, D]."""
    with no_autocast(patches):
        picked = gather_rows(full_precision(patches), wanted.flatten(1))  # the norm is per token: picked first
        return F.layer_norm(picked, picked.shape[-1:]).unflatten(1, wanted.shape[1:])
