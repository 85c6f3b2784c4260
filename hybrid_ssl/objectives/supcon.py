"""Supervised contrastive learning: crops of all images of a class attract each other, all others repel.

Source: Khosla et al., "Supervised Contrastive Learning", arXiv 2004.11362. Written from the paper and a fact sheet;
checked against a double loop and the reductions below.

    L_out = mean over rows i of -1/|P(i)| sum over p in P(i) of log softmax(z_i . z_p / tau)
    L_in  = mean over rows i of -log( 1/|P(i)| sum over p in P(i) of softmax(z_i . z_p / tau) )

P(i) are the other rows with i's label, on any process; the softmax runs over all other rows. L_out is the paper's
choice (ImageNet, ResNet-50: 78.7 against 67.4). With labels that are image numbers both are SimCLR's loss; with one
positive p and one negative n both are softplus((|a - p|^2 - |a - n|^2) / 2 tau), a smooth triplet loss of margin 2 tau.
The official code multiplies by tau / 0.07 (here: `weight`); at least one library that says SupCon computes L_in.

Each class should come at least twice in a batch. Swin: yes. Shapes: V crops, B images, D encoder width, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..nn.contrast import supcon, unit
from ..nn.distributed import world_size
from ..nn.heads import Mlp
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of


class SupConSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of any number of crops (paper: 2)"""
    temperature: float = Field(0.1, gt=0)
    form: Literal["out", "in"] = "out"
    """`out`: mean of log-probabilities; `in`: log of the mean probability"""
    hidden: int | None = Field(None, ge=1)
    """width of the head's hidden layer; null: the encoder's, as in the paper"""
    dim: int = Field(128, ge=1)


class SupCon(Objective):
    """Contrast classes; needs labels."""

    Config = SupConSettings
    needs_labels = True

    def __init__(self, cfg: SupConSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.count = crops_of(encoder, cfg.view)
        self.crops = Forward("student", cfg.view)
        self.needs = (self.crops,)
        dims = (encoder.dim, cfg.hidden or encoder.dim, cfg.dim)
        self.projector = Mlp(dims, norm=False, last_norm="none", bias=True, last_bias=True)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `chance`: the loss when all embeddings are one."""
        if batch.labels is None:
            raise ValueError(
                "supcon compares classes, but these images have no labels: use class folders or name a column with "
                "data.label; simclr is the same method without labels"
            )
        rows = unit(self.projector(tokens[self.crops].cls))  # [V*B, d]
        loss = supcon(rows, batch.labels.repeat(self.count), self.cfg.temperature, self.cfg.form)
        others = len(rows) * world_size() - 1
        return {"loss": loss, "chance": torch.full_like(loss.detach(), math.log(max(1, others)))}
