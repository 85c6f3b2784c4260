"""MaskFeat: masked feature prediction. Predict the oriented gradients of hidden patches with one linear layer.

Source: Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training", arXiv 2112.09133. Written from
the paper and a fact sheet. The encoder sees every position, hidden ones as a learned mask token; the target of a patch
are the histograms of its 8 x 8 pixel cells (`nn/hog.py`) on the *normalised* image, whose channels therefore weigh by
1 / std. The loss is the mean squared error of the hidden patches, of all processes together: an image with more hidden
patches weighs more, as published.

Works on Swin, with masks on the grid of output tokens and 4 x 4 cells in a token of 32 pixels.
Shapes: B images (V * B with several crops), N patches, n hidden ones in the micro-batch, L = C * 9 * k * k values of a
patch's target with k x k cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..nn.distributed import ragged_mean
from ..nn.hog import hog_patches
from ..nn.precision import for_weight, full_precision
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings


class MaskFeatSettings(ObjectiveSettings):
    """Defaults: the paper's for images."""

    view: str = "plain"
    mask: str = "block"
    """paper: blocks, 40 % hidden"""
    cell: int = Field(8, ge=1)
    """side of a cell in pixels; divides the encoder's stride"""
    bins: int = Field(9, ge=2)
    """unsigned orientations"""


class MaskFeat(Objective):
    """Predict the HOG features of patches that were replaced by the mask token."""

    Config = MaskFeatSettings
    compares_views = False

    def __init__(self, cfg: MaskFeatSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.masked = Forward("student", cfg.view, cfg.mask)
        self.needs = (self.masked,)
        self.stride = encoder.stride
        if self.stride % cfg.cell:
            raise ValueError(
                f"a token of {self.stride} pixels has no whole number of cells of {cfg.cell}: set cell to one of "
                f"{', '.join(str(n) for n in (8, 4, 2) if self.stride % n == 0) or self.stride}"
            )
        self.head = nn.Linear(encoder.dim, encoder.in_chans * cfg.bins * (self.stride // cfg.cell) ** 2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: squared error per value; `baseline`: that of predicting the mean histogram of the hidden patches."""
        rows = batch.hidden_rows(self.cfg.mask)  # [n]
        target = self.target(batch).flatten(0, 1).index_select(0, rows)  # [n, L]
        hidden = tokens[self.masked].patches.flatten(0, 1).index_select(0, rows)  # [n, D]
        predicted = full_precision(self.head(for_weight(hidden, self.head.weight)))  # [n, L]
        with torch.no_grad():
            baseline = (target - target.mean(0)).square().sum() / max(1, target.numel())
        each = F.mse_loss(predicted, target, reduction="none").mean(1)  # [n]
        return {"loss": ragged_mean(each), "baseline": baseline}

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        """HOG features of all patches: [B, N, L]."""
        return hog_patches(batch.views[self.cfg.view], self.stride, self.cfg.cell, self.cfg.bins)
