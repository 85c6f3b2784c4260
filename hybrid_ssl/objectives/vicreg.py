"""VICReg: bring two crops' embeddings together, keep every dimension's variance up and their covariances down.

Source: Bardes, Ponce, LeCun, "VICReg: Variance-Invariance-Covariance Regularization", arXiv 2105.04906. Written from
the paper and a fact sheet; checked against an independent computation and lightly's loss.

    loss = 25 invariance + 25 variance + 1 covariance, as in the code behind the published results:
    invariance   mean over images and dimensions of (z1 - z2)^2       (the paper's text sums over dimensions)
    variance     mean over both crops and all dimensions of max(0, 1 - sqrt(Var + 1e-4))         (the text adds crops)
    covariance   sum over both crops of the squared off-diagonal covariances / d

Variance and covariance are those of the global batch, with gradients to all processes. Embeddings are neither
normalised nor standardised. A library that forgets to halve the variance term trains with a weight of 50.

Swin: yes. Shapes: B images, D encoder width, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from ..nn.heads import Mlp
from ..nn.redundancy import vicreg_terms
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops


class VICRegSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of two crops"""
    invariance: float = Field(25.0, ge=0)
    variance: float = Field(25.0, ge=0)
    covariance: float = Field(1.0, ge=0)
    hidden: int = Field(8192, ge=1)
    """width of the projector's two hidden layers"""
    dim: int = Field(8192, ge=1)
    """width of the embeddings"""


class VICReg(Objective):
    """Regularise variance, invariance and covariance."""

    Config = VICRegSettings

    def __init__(self, cfg: VICRegSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        check_two_crops(encoder, cfg.view, "vicreg")
        self.cfg = cfg
        self.crops = Forward("student", cfg.view)
        self.needs = (self.crops,)
        self.projector = Mlp((encoder.dim, cfg.hidden, cfg.hidden, cfg.dim), last_norm="none", bias=True)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `invariance`, `variance` and `covariance`: its terms without weights; `chance`: the loss when all
        embeddings are one."""
        first, second = (self.projector(crop) for crop in tokens[self.crops].cls.chunk(2))  # [B, d]
        terms = vicreg_terms(first, second)
        cfg = self.cfg
        loss = cfg.invariance * terms.invariance + cfg.variance * terms.variance + cfg.covariance * terms.covariance
        logs = {name: value.detach() for name, value in terms._asdict().items()}
        constant = cfg.variance * (1 - 1e-4**0.5)  # no distance, no variance, no covariance
        return {"loss": loss, **logs, "chance": torch.full_like(loss.detach(), constant)}
