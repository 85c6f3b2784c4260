"""Barlow Twins: make the cross-correlation of two crops' embeddings, dimension by dimension, the identity.

Source: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", arXiv 2103.03230. Written
from the paper and a fact sheet; checked against an independent computation and lightly's loss.

    loss = sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2,   C = Z1^T Z2 / M

Z are the embeddings of the global batch, standardised per crop. The official code adds C up over devices outside the
graph: its gradient is 1/W of this one, which LARS forgives for matrices, not for biases and norms. With M < D / 2 the
M x M form is computed, see `nn/redundancy.py`.

Swin: yes. Shapes: M images of the global batch, D encoder width, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from ..nn.heads import Mlp
from ..nn.redundancy import barlow_twins_terms
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops


class BarlowTwinsSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of two crops"""
    off_diagonal: float = Field(0.0051, ge=0)
    """lambda, the weight of the off-diagonal terms"""
    hidden: int = Field(8192, ge=1)
    """width of the projector's two hidden layers"""
    dim: int = Field(8192, ge=1)
    """width of the embeddings: large ones work best"""


class BarlowTwins(Objective):
    """Reduce redundancy between dimensions."""

    Config = BarlowTwinsSettings

    def __init__(self, cfg: BarlowTwinsSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        check_two_crops(encoder, cfg.view, "barlow_twins")
        self.cfg = cfg
        self.crops = Forward("student", cfg.view)
        self.needs = (self.crops,)
        self.projector = Mlp((encoder.dim, cfg.hidden, cfg.hidden, cfg.dim), last_norm="none")

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `on_diagonal` and `off_diagonal`: its terms, the second without lambda; `chance`: the loss when all
        embeddings are one."""
        first, second = (self.projector(crop) for crop in tokens[self.crops].cls.chunk(2))  # [B, d]
        terms = barlow_twins_terms(first, second)
        loss = terms.on_diagonal + self.cfg.off_diagonal * terms.off_diagonal
        logs = {name: value.detach() for name, value in terms._asdict().items()}
        return {"loss": loss, **logs, "chance": torch.full_like(loss.detach(), self.cfg.dim)}
