"""MoCo v3: each crop's query finds the key of the other crop among the keys of all images of the global batch.

Source: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057. Written
from the paper and a fact sheet; no code of the official, non-commercial repository was used.

    loss = ctr(q1, k2) + ctr(q2, k1),   ctr(q, k) = 2 tau * cross-entropy(q k^T / tau, own key)

Queries pass encoder, projector and predictor; keys pass the teacher's encoder and projector and carry no gradient.
Negatives are the other images' keys of the same crop: no queue, no negatives from one's own crop. BatchNorm in the
heads runs over the global batch, one crop at a time. The factor 2 tau keeps the gradient's size about independent of
tau; at the start of training the loss is near 4 tau ln(M).

The paper moves the teacher before the keys are computed. Here a teacher moves after the step, which gives the same
keys if step t is followed by the momentum of step t + 1: recipes set `teacher.offset: 1`, and with it only the last
teacher differs. The frozen patch embedding is the encoder's business (`encoder.freeze_patch_embed`).

Beyond the paper, `mask` lets queries read a masked crop (with `drop`, MAE's visible patches, as CMAE does), so that
MAE and MoCo v3 share one pass. Shapes: B images, D encoder width, d head width, M images of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nn.contrast import info_nce, unit
from ..nn.distributed import gather_no_grad
from ..nn.heads import Mlp
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops


class MoCoV3Settings(ObjectiveSettings):
    """Defaults: the paper's for ViT."""

    view: str = "global"
    """a view group of two crops"""
    mask: str | None = None
    """a mask for the queries; null: they read whole crops, as in the paper. Keys always do"""
    drop: bool = False
    """with `mask`: remove the hidden patches instead of replacing them by the mask token"""
    temperature: float = Field(0.2, gt=0)
    hidden: int = Field(4096, ge=1)
    """width of the hidden layers: two in the projector, one in the predictor"""
    dim: int = Field(256, ge=1)
    """width of queries and keys"""

    @model_validator(mode="after")
    def _drop_needs_a_mask(self) -> MoCoV3Settings:
        if self.drop and self.mask is None:
            raise ValueError("drop: true needs a mask that says which patches: set `mask` as well")
        return self


class MoCoV3(Objective):
    """Contrast two crops of each image with those of all other images."""

    Config = MoCoV3Settings

    def __init__(self, cfg: MoCoV3Settings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        check_two_crops(encoder, cfg.view, "moco_v3")
        self.cfg = cfg
        self.query = Forward("student", cfg.view, cfg.mask, cfg.drop)
        self.key = Forward("teacher", cfg.view)
        self.needs = (self.query, self.key)
        self.projector = Mlp((encoder.dim, cfg.hidden, cfg.hidden, cfg.dim))
        self.predictor = Mlp((cfg.dim, cfg.hidden, cfg.dim))
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: the sum of both directions; `similarity`: mean cosine of a query and its key."""
        with torch.no_grad():
            own = torch.stack([self._key(crop) for crop in tokens[self.key].cls.chunk(2)], dim=1)  # [B, 2, d]
            keys1, keys2 = gather_no_grad(own).unbind(1)  # [M, d] each, in one gather
        query1, query2 = (self._query(crop) for crop in tokens[self.query].cls.chunk(2))  # [B, d] each
        tau = self.cfg.temperature
        loss = 2 * tau * (info_nce(query1, keys2, tau) + info_nce(query2, keys1, tau))
        with torch.no_grad():
            similarity = (torch.stack((query2, query1), dim=1) * own).sum(-1).mean()
        return {"loss": loss, "similarity": similarity}

    def _query(self, cls: Tensor) -> Tensor:
        return unit(self.predictor(self.projector(cls)))

    def _key(self, cls: Tensor) -> Tensor:
        return unit(self.teacher_projector(cls))

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_projector, self.projector),)  # never the predictor
