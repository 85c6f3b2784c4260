"""SimCLR: each crop finds the other crop of its image among all crops of the global batch.

Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709. Written
from the paper and a fact sheet; checked against a double loop, and against lightly's loss.

    loss = mean over 2M crops i of -log( exp(cos(z_i, z_j) / tau) / sum over k != i of exp(cos(z_i, z_k) / tau) )

Negatives are all other crops of all processes, and gradients flow to them too. The head sees both crops in one call:
its BatchNorm is over all 2M rows. The official TensorFlow code adds the means of the two views: twice this loss, which
matters for SGD only. Negatives come from one forward pass: gradient accumulation keeps the batch of a step, not them.

Swin: yes, only the pooled feature is read. Shapes: M images of the global batch, D encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from ..nn.contrast import nt_xent
from ..nn.distributed import world_size
from ..nn.heads import Mlp
from ..nn.prediction import mean_cosine
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops


class SimCLRSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of two crops"""
    temperature: float = Field(0.1, gt=0)
    """0.5 for CIFAR-10"""
    layers: int = Field(2, ge=1)
    """linear layers of the head; 3 in SimCLR v2 (arXiv 2006.10029)"""
    hidden: int | None = Field(None, ge=1)
    """width of the hidden layers; null: the encoder's, as in the paper"""
    dim: int = Field(128, ge=1)
    """width in which crops are compared"""


class SimCLR(Objective):
    """Contrast two crops of each image with each other and with all other images'."""

    Config = SimCLRSettings

    def __init__(self, cfg: SimCLRSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        check_two_crops(encoder, cfg.view, "simclr")
        self.cfg = cfg
        self.crops = Forward("student", cfg.view)
        self.needs = (self.crops,)
        hidden = [cfg.hidden or encoder.dim] * (cfg.layers - 1)
        self.projector = Mlp((encoder.dim, *hidden, cfg.dim), last_norm="scale")

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `similarity`: mean cosine of an image's crops; `chance`: the loss when all embeddings are one."""
        first, second = self.projector(tokens[self.crops].cls).chunk(2)  # [N, d] each
        loss = nt_xent(first, second, self.cfg.temperature)
        others = 2 * len(first) * world_size() - 1
        return {
            "loss": loss,
            "similarity": mean_cosine(first.detach(), second),
            "chance": torch.full_like(loss.detach(), math.log(others)),
        }
