"""SimSiam: predict one crop's embedding from the other's; no negatives, no teacher.

Source: Chen, He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566. Written from the paper and a
fact sheet; checked against an independent computation and lightly's loss.

    loss = -1/2 cos(p1, sg z2) - 1/2 cos(p2, sg z1)        z = projector(encoder), p = predictor(z), sg: no gradient

The last BatchNorm of the projector has no parameters and belongs to z; BatchNorm runs over the global batch, one crop
at a time. The official projector has a frozen last bias that this BatchNorm takes away again: there is none here. The
predictor keeps its learning rate while the others' falls (about half a point). A loss near -1 does not tell success
from collapse: `spread` does.

Swin: yes. Shapes: B images, D encoder width, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import Field
from torch import Tensor

from ..nn.heads import Mlp
from ..nn.prediction import simsiam_loss, spread
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, ParamRule, check_two_crops


class SimSiamSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of two crops"""
    dim: int = Field(2048, ge=1)
    """width of all three layers of the projector"""
    bottleneck: int = Field(512, ge=1)
    """width of the predictor's hidden layer"""
    constant_predictor_lr: bool = True
    """the predictor's learning rate does not follow the schedule"""


class SimSiam(Objective):
    """Predict the other crop, with a stopped gradient."""

    Config = SimSiamSettings

    def __init__(self, cfg: SimSiamSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        check_two_crops(encoder, cfg.view, "simsiam")
        self.cfg = cfg
        self.crops = Forward("student", cfg.view)
        self.needs = (self.crops,)
        self.projector = Mlp((encoder.dim, cfg.dim, cfg.dim, cfg.dim))
        self.predictor = Mlp((cfg.dim, cfg.bottleneck, cfg.dim), last_norm="none", last_bias=True)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `spread`: about 1 when embeddings differ between images, 0 when all are one."""
        embedding1, embedding2 = (self.projector(crop) for crop in tokens[self.crops].cls.chunk(2))  # [B, d]
        predictions = (self.predictor(embedding1), self.predictor(embedding2))
        loss = simsiam_loss(predictions, (embedding1, embedding2))
        return {"loss": loss, "spread": spread(embedding1)}

    def param_rules(self) -> Iterable[ParamRule]:
        return (ParamRule(tuple(self.predictor.parameters()), constant_lr=self.cfg.constant_predictor_lr),)
