"""CMAE: a masked autoencoder whose second decoder predicts a feature that is contrasted with the whole picture's.

Source: Huang et al., "Contrastive Masked Autoencoders are Stronger Vision Learners", arXiv 2207.13532; constants of the
released configuration. Written from the paper and a fact sheet; the repository carries no licence and was not used.

    loss = L_r + w L_c,   L_r = MAE's,   L_c = 2 tau * cross-entropy(q k^T / tau, own key),   w = 1
    q = predictor(projector(mean over all N patches of feature decoder(visible tokens)))
    k = teacher projector(mean over all N patches of teacher(target view))

What is put together from parts: `L_r`, its decoder, the dropped patches and `reconstruct` are `MAE`, which this class
extends; `L_c` is MoCo v3's InfoNCE in one direction. New are the feature decoder, whose mask tokens are averaged like
the visible ones, and the target view: a window of the same crop, moved by 0 .. 31 pixels, alone with colour jitter.
Without the feature decoder the method is two entries of a recipe (mae + moco_v3 with mask and drop), see the recipe.

The target is the last block's output before the encoder's last norm, as released. The teacher's BatchNorm uses its own
batch, over all processes. Biases before a BatchNorm, which takes them out again, are left out. The teacher moves after
the step with a constant momentum of 0.996 (`teacher.momentum`). The paper says 75 % hidden, the released code hides
65 % in units of 2 x 2 patches.

Shapes: B images, N patches, D encoder width, d head width, M images of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.contrast import info_nce, unit
from ..nn.decoder import Decoder
from ..nn.distributed import gather_no_grad
from ..nn.heads import Mlp
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens, hidden_columns, visible_rows
from .base import crops_of
from .mae import MAE, MAESettings


class CMAESettings(MAESettings):
    """Defaults: the released configuration's for ViT-B. The inherited ones are those of the pixel decoder."""

    view: str = "online"
    """a view with `shift`, without colour"""
    target_view: str = "target"
    """what the teacher sees, whole: a view `like` the other one, with the same `shift`, and with colour"""
    mask: str = "units"
    """released: random, ratio 0.65, units of 32 pixels"""
    feature_depth: int = Field(2, ge=1)
    """blocks of the feature decoder, as wide as the pixel decoder"""
    hidden: int = Field(1536, ge=1)
    """width of the hidden layer in projector and predictor"""
    dim: int = Field(256, ge=1)
    """width of queries and keys"""
    temperature: float = Field(0.07, gt=0)
    contrast_weight: float = Field(1.0, ge=0)
    """w"""


class CMAE(MAE):
    """Reconstruct dropped patches, and recognise the picture they are missing from."""

    Config = CMAESettings
    compares_views = True
    cfg: CMAESettings

    def __init__(self, cfg: CMAESettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        for view in (cfg.view, cfg.target_view):
            if crops_of(encoder, view) != 1:
                raise ValueError(
                    f"cmae contrasts one crop of an image with one target, but view {view!r} has "
                    f"{encoder.crops[view]} crops: set views.{view}.crops to 1"
                )
        encoder.require(cfg.target_view, f"like={cfg.view}")
        self.target = Forward("teacher", cfg.target_view, layers=1)
        self.needs = (self.visible, self.target)
        shape = (cfg.decoder_dim, cfg.feature_depth, cfg.decoder_heads, cfg.mlp_ratio)
        self.feature_decoder = Decoder(encoder.dim, self.grid, encoder.dim, *shape)
        self.projector = Mlp((encoder.dim, cfg.hidden, cfg.dim), last_norm="none", eps=1e-6)
        self.predictor = Mlp((cfg.dim, cfg.hidden, cfg.dim), last_norm="none", eps=1e-6)
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `pixels` and its `baseline`, as in MAE; `contrast`: L_c; `similarity`: cosine of query and key."""
        terms = super().loss(tokens, batch, now)
        with torch.no_grad():
            whole = tokens[self.target].layers[-1].mean(1)  # [B, D], without the class token
            own = unit(self.teacher_projector(whole))  # [B, d]
            keys = gather_no_grad(own)  # [M, d]
        query = unit(self.predictor(self.projector(self._feature(tokens, batch))))
        contrast = 2 * self.cfg.temperature * info_nce(query, keys, self.cfg.temperature)
        return {
            "loss": terms["loss"] + self.cfg.contrast_weight * contrast,
            "pixels": terms["loss"].detach(),
            "baseline": terms["baseline"],
            "contrast": contrast.detach(),
            "similarity": (query.detach() * own).sum(-1).mean(),
        }

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_projector, self.projector),)

    def _feature(self, tokens: Mapping[Forward, Tokens], batch: Batch) -> Tensor:
        """What the feature decoder makes of the visible patches, averaged over all patches: [B, D]."""
        seen, mask = tokens[self.visible], batch.masks[self.cfg.mask]
        count = seen.patches.shape[1]
        visible, hidden = visible_rows(mask, count), hidden_columns(mask, mask.shape[1] - count)
        return self.feature_decoder.mean(seen.cls, seen.patches, visible, hidden)
