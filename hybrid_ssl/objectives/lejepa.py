"""LeJEPA: crops of an image agree, and features are normally distributed; no teacher, no stop-gradient, no centre.

Source: Balestriero and LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", arXiv
2511.08544. Written from the paper and a fact sheet; tested against an independent computation.

    invariance = mean over crops, images and dimensions of (z - mu)^2, mu the mean of the image's crops
    loss       = (1 - lam) * invariance + lam * SIGReg      (`form: sum`: invariance + lam * SIGReg)

mu is the mean of the global crops (for 2 global and 6 local ones) or of all (`center: all`, the authors' minimal
script); it is not detached. SIGReg (`nn/sigreg.py`) looks at every crop group, global ones included, each crop of the
recipe as a sample of its own, or all crops together (`pooled`, as stable-pretraining counts). It is multiplied by the
number of images of all processes, so lam means more in a larger batch. Its directions are drawn anew in every
micro-batch, from (seed, step, micro-batch), the same on every process.

BatchNorm in the projector sees all crops together, as in the authors' script. Shapes: B images, G global crops, V crops
in all, D encoder width, d projector width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..nn.heads import Mlp
from ..nn.precision import full_precision, no_autocast
from ..nn.sigreg import random_directions, sigreg
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of


class LeJEPASettings(ObjectiveSettings):
    """Defaults: 2 global and 6 local crops; `lejepa_vits.yaml` has the authors' minimal script."""

    global_view: str = "global"
    """large crops, or all of them if there is no local view"""
    local_view: str | None = "local"
    """small crops; null: none"""
    mask: str | None = None
    """a mask for the global crops; null: none, as in the paper"""
    lam: float = Field(0.02, ge=0, le=1)
    """lambda, the share of SIGReg; published: 0.01 to 0.1"""
    form: Literal["convex", "sum"] = "convex"
    """`convex`: (1 - lam) * invariance + lam * SIGReg; `sum`: invariance + lam * SIGReg"""
    center: Literal["global", "all"] = "global"
    """whose mean an image's crops are drawn to"""
    pooled: bool = False
    """count the crops of all views as one sample of V*B rows, which makes SIGReg larger"""
    slices: int = Field(1024, ge=1)
    """random directions of a step (minimal script: 256)"""
    knots: int = Field(17, ge=2)
    """points at which characteristic functions are compared"""
    hidden: int = Field(2048, ge=1)
    """width of the projector's two hidden layers"""
    dim: int = Field(64, ge=1)
    """d, the projector's width; published: 16 to 512"""


class LeJEPA(Objective):
    """Invariance to crops, with features regularised to be normal."""

    Config = LeJEPASettings

    def __init__(self, cfg: LeJEPASettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.whole = Forward("student", cfg.global_view, cfg.mask)
        self.local = None if cfg.local_view is None else Forward("student", cfg.local_view)
        self.needs = tuple(need for need in (self.whole, self.local) if need)
        self.globals = crops_of(encoder, cfg.global_view)
        self.crops = self.globals + (0 if cfg.local_view is None else crops_of(encoder, cfg.local_view))
        if self.crops < 2:
            raise ValueError(
                f"lejepa compares crops of an image, but view {cfg.global_view!r} has one crop and there is no local "
                f"view: set views.{cfg.global_view}.crops to 2 or more, or name a local_view"
            )
        self.projector = Mlp(
            (encoder.dim, cfg.hidden, cfg.hidden, cfg.dim), last_norm="none", bias=True, last_bias=True
        )

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss` and its two terms."""
        cfg = self.cfg
        z = self.projector(torch.cat([tokens[need].cls for need in self.needs]))
        z = z.unflatten(0, (self.crops, -1))  # [V, B, d]
        agreement = invariance(z, self.globals if cfg.center == "global" else self.crops)
        directions = random_directions(cfg.dim, cfg.slices, now.seed, now.step, now.micro)
        normality = sigreg(z.flatten(0, 1) if cfg.pooled else z, directions, cfg.knots)
        share = 1 - cfg.lam if cfg.form == "convex" else 1.0
        loss = share * agreement + cfg.lam * normality
        return {"loss": loss, "invariance": agreement.detach(), "sigreg": normality.detach()}


def invariance(z: Tensor, centers: int) -> Tensor:
    """Mean squared distance of the crops' features to the mean of the first `centers` crops; [V, B, d] -> scalar."""
    with no_autocast(z):
        z = full_precision(z)
        return (z - z[:centers].mean(0)).square().mean()
