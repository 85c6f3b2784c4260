"""SimMIM: a simple framework for masked image modelling. Predict raw pixels of hidden patches with one linear layer.

Source: Xie et al., arXiv 2111.09886; written from the paper, checked against transformers' implementation. The encoder
(ViT or Swin) sees every position, hidden ones as a learned mask token; masks come in units of 32 pixels, wholly hidden
or wholly visible, so the head needs to run on hidden tokens only and its linear layer is the paper's 1 x 1 convolution
with PixelShuffle (torch initialises both alike). The loss is the mean L1 distance over the hidden values of the
normalised image. The published code adds 1e-5 to the number of hidden pixels, which float32 loses from 256 pixels on;
here a batch with nothing hidden has loss 0 instead. With masks of varying size, micro-batches weigh alike, not pixels.

Shapes: B images (V * B with several crops), N tokens, n hidden ones in the whole batch, s = encoder stride in pixels,
L = C * s * s values of a token, in order "c p q".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn.patches import patchify, unpatchify
from ..nn.precision import for_weight, full_precision
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings


class SimMIMSettings(ObjectiveSettings):
    """The head has no settings; ratio and unit of the mask are the mask's."""

    view: str = "plain"
    mask: str = "units"
    """paper: random, ratio 0.6, units of 32 pixels, also for a ViT with patches of 16"""


class SimMIM(Objective):
    """Reconstruct patches that were replaced by the mask token."""

    Config = SimMIMSettings
    compares_views = False

    def __init__(self, cfg: SimMIMSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.masked = Forward("student", cfg.view, cfg.mask)
        self.needs = (self.masked,)
        self.grid, self.stride = encoder.grids[cfg.view], encoder.stride
        self.head = nn.Linear(encoder.dim, encoder.in_chans * self.stride**2)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: L1 distance per hidden value; `baseline`: that of predicting the mean of the hidden values."""
        rows = batch.hidden_rows(self.cfg.mask)
        target = self._pixels(batch).flatten(0, 1).index_select(0, rows)  # [n, L]
        hidden = tokens[self.masked].patches.flatten(0, 1).index_select(0, rows)  # [n, D]
        predicted = full_precision(self._predict(hidden))  # [n, L]
        values = max(1, target.numel())
        return {
            "loss": (predicted - target).abs().sum() / values,
            "baseline": (target - target.mean()).abs().sum() / values,
        }

    @torch.no_grad()
    def reconstruct(self, tokens: Mapping[Forward, Tokens], batch: Batch) -> Tensor:
        """The images [B, C, H, W] with predictions in place of the hidden patches."""
        pixels = self._pixels(batch)  # [B, N, L]
        predicted = self._predict(tokens[self.masked].patches).to(pixels.dtype)
        painted = torch.where(batch.masks[self.cfg.mask].unsqueeze(-1), predicted, pixels)
        return unpatchify(painted, self.grid, self.stride, "c p q")

    def _predict(self, patches: Tensor) -> Tensor:
        return self.head(for_weight(patches, self.head.weight))

    def _pixels(self, batch: Batch) -> Tensor:
        return patchify(full_precision(batch.views[self.cfg.view]), self.stride, "c p q")  # [B, N, L]
