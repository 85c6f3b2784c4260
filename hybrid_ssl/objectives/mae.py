"""MAE: masked autoencoder. Encode a quarter of the patches, predict the pixels of the others.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377; written from the paper, checked
against transformers' implementation on the same weights. The hidden patches never enter the encoder (`drop=True`: a
ViT; a Swin's windows cannot do without them). A decoder sees class token, visible tokens and mask tokens; the loss is
the squared error on the hidden patches, whose pixels are normalised patch by patch.

Equal in value to the published form, at less cost: only hidden tokens go through the decoder's last block and the
prediction. Where an encoder has no class token, its pooled feature takes the class token's place in the decoder (the
paper's encoders all have one).

Shapes: B images (V * B with several crops), N patches, n hidden ones, L = C * p * p values of a patch in order "p q c".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..nn.decoder import Decoder
from ..nn.patches import gather_rows, patch_statistics, patchify, unpatchify
from ..nn.precision import full_precision
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens, hidden_columns, visible_rows
from .base import Objective, ObjectiveSettings


class MAESettings(ObjectiveSettings):
    """Defaults: the paper's, for every encoder size."""

    view: str = "plain"
    mask: str = "random"
    """a mask that hides the same number of patches in every crop (paper: random, ratio 0.75)"""
    decoder_dim: int = Field(512, ge=4, multiple_of=4)
    decoder_depth: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    """hidden width of the decoder's MLPs over `decoder_dim`"""
    norm_pixels: bool = True
    """normalise the target pixels of each patch; false: predict the pixels of the normalised image"""

    @model_validator(mode="after")
    def _heads_divide(self) -> MAESettings:
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads {self.decoder_heads} does not divide decoder_dim {self.decoder_dim}")
        return self


class MAE(Objective):
    """Reconstruct dropped patches."""

    Config = MAESettings
    compares_views = False

    def __init__(self, cfg: MAESettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.visible = Forward("student", cfg.view, cfg.mask, drop=True)
        self.needs = (self.visible,)
        self.grid, self.size = encoder.grids[cfg.view], encoder.stride
        self.decoder = Decoder(
            encoder.dim,
            self.grid,
            encoder.in_chans * self.size**2,
            cfg.decoder_dim,
            cfg.decoder_depth,
            cfg.decoder_heads,
            cfg.mlp_ratio,
        )

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: mean over hidden patches and their values; `baseline`: that of predicting the targets' mean."""
        predicted, hidden = self._predict(tokens, batch)
        target = gather_rows(self._pixels(batch), hidden)  # [B, n, L]
        if self.cfg.norm_pixels:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
        return {
            "loss": (full_precision(predicted) - target).square().mean(),
            "baseline": target.var(correction=0),
        }

    @torch.no_grad()
    def reconstruct(self, tokens: Mapping[Forward, Tokens], batch: Batch) -> Tensor:
        """The images [B, C, H, W] with predictions in place of the hidden patches.

        With `norm_pixels` the prediction knows neither brightness nor contrast of a patch: they are the original's.
        """
        predicted, hidden = self._predict(tokens, batch)
        pixels = self._pixels(batch)  # [B, N, L]
        predicted = predicted.to(pixels.dtype)
        if self.cfg.norm_pixels:
            mean, std = patch_statistics(gather_rows(pixels, hidden))
            predicted = predicted * std + mean
        painted = pixels.scatter(1, hidden.unsqueeze(-1).expand_as(predicted), predicted)
        return unpatchify(painted, self.grid, self.size, "p q c")

    def _predict(self, tokens: Mapping[Forward, Tokens], batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions [B, n, L] and the positions [B, n] they are for."""
        seen, mask = tokens[self.visible], batch.masks[self.cfg.mask]
        count = seen.patches.shape[1]  # known without asking the device
        visible, hidden = visible_rows(mask, count), hidden_columns(mask, mask.shape[1] - count)
        return self.decoder(seen.cls, seen.patches, visible, hidden), hidden

    def _pixels(self, batch: Batch) -> Tensor:
        return patchify(full_precision(batch.views[self.cfg.view]), self.size, "p q c")  # [B, N, L]
