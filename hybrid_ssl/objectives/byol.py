"""BYOL: predict the teacher's embedding of one crop from the other crop; no negatives.

Source: Grill et al., "Bootstrap Your Own Latent", arXiv 2006.07733. Written from the paper and a fact sheet; checked
against an independent computation.

    loss = |n(p1) - n(t2)|^2 + |n(p2) - n(t1)|^2 = 4 - 2 cos(p1, t2) - 2 cos(p2, t1)

p = predictor(projector(student)), t = teacher's projector(teacher), n = unit length. What keeps the embeddings from
becoming one: no gradient to the teacher, a predictor that the teacher does not have, and BatchNorm in the hidden
layers, over the global batch, one crop at a time, in the teacher's head as well (with its own batch). The teacher moves
after the step (`teacher.offset: 0`). A loss near 0 means collapse, not success: look at `spread`.

The official code draws the teacher's first weights apart from the student's; here they are copies. Its brightness
jitter is additive, ours multiplicative. Swin: yes. Shapes: B images, D encoder width, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.heads import Mlp
from ..nn.prediction import byol_loss, spread
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops


class BYOLSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of two crops"""
    hidden: int = Field(4096, ge=1)
    """width of the hidden layer of projector and predictor"""
    dim: int = Field(256, ge=1)
    """width of predictions and targets"""


class BYOL(Objective):
    """Predict a slowly moving teacher."""

    Config = BYOLSettings

    def __init__(self, cfg: BYOLSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        check_two_crops(encoder, cfg.view, "byol")
        self.online = Forward("student", cfg.view)
        self.target = Forward("teacher", cfg.view)
        self.needs = (self.online, self.target)
        self.projector = Mlp((encoder.dim, cfg.hidden, cfg.dim), last_norm="none", bias=True)
        self.predictor = Mlp((cfg.dim, cfg.hidden, cfg.dim), last_norm="none", bias=True)
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `spread`: of the targets, about 1 when they differ between images, 0 when all are one."""
        with torch.no_grad():
            target1, target2 = (self.teacher_projector(crop) for crop in tokens[self.target].cls.chunk(2))  # [B, d]
        prediction1, prediction2 = (self.predictor(self.projector(crop)) for crop in tokens[self.online].cls.chunk(2))
        loss = byol_loss((prediction1, prediction2), (target1, target2))
        return {"loss": loss, "spread": spread(target1)}

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_projector, self.projector),)  # never the predictor
