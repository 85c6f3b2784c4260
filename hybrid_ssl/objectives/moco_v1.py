"""MoCo v1: a crop's query finds the key of the image's other crop among a long queue of earlier images' keys.

Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", arXiv 1911.05722. Written from
the paper and a fact sheet; checked against an independent computation over several steps.

    loss = -log( exp(q . k / tau) / (exp(q . k / tau) + sum over the queue of exp(q . k_j / tau)) )

One direction only: queries from the first crop, keys from the second. The queue is read before the new keys join it,
so no key is ever its own negative; it holds the keys of all processes, equal on each, and is part of a checkpoint. It
starts as random directions. Any size will do, since the ring wraps (the official code needs a multiple of the global
batch); one larger than the data set makes an image its own negative.

The paper moves the teacher before the keys are computed: `teacher.offset: 1`, see `moco_v3`; at v1's constant momentum
of 0.999 that is the same as 0. Shuffling images between devices keeps a device's BatchNorm statistics from giving
the answer away; ViT, Swin and this head have none, and a ResNet's are those of all devices, so nothing is shuffled.

Swin: yes. Shapes: B images, D encoder width, d head width, K keys in the queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.contrast import queue_nce, unit
from ..nn.heads import Mlp
from ..nn.prediction import mean_cosine
from ..nn.queue import Queue
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops, crops_of


class MoCoV1Settings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "global"
    """a view group of two crops, the first for queries and the second for keys; of one, if `key_view` is given"""
    key_view: str | None = None
    """a view group of one crop for the keys, so that neither encoder sees a crop that the loss does not read"""
    temperature: float = Field(0.07, gt=0)
    queue: int = Field(65536, ge=1)
    """K; less than the number of images of the data set"""
    dim: int = Field(128, ge=1)
    """width of queries and keys"""


class MoCoV1(Objective):
    """Contrast with a queue of keys from a slowly moving teacher."""

    Config: ClassVar[type[MoCoV1Settings]] = MoCoV1Settings

    def __init__(self, cfg: MoCoV1Settings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        if cfg.key_view is None:
            check_two_crops(encoder, cfg.view, cfg.name)
        elif (crops := (crops_of(encoder, cfg.view), crops_of(encoder, cfg.key_view))) != (1, 1):
            raise ValueError(
                f"with key_view, {cfg.name} compares one crop of view {cfg.view!r} with one of {cfg.key_view!r}, but "
                f"they have {crops[0]} and {crops[1]}: set views.NAME.crops to 1, or leave key_view out"
            )
        self.cfg = cfg
        self.query = Forward("student", cfg.view)
        self.key = Forward("teacher", cfg.key_view or cfg.view)
        self.needs = (self.query, self.key)
        self.projector = self.build_projector(encoder.dim)
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)
        self.queue = Queue(cfg.queue, cfg.dim)

    def build_projector(self, width: int) -> Mlp:
        """One linear layer."""
        return Mlp((width, self.cfg.dim), last_norm="none", last_bias=True)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `similarity`: mean cosine of a query and its key; `chance`: the loss when all embeddings are one."""
        crops = 2 if self.cfg.key_view is None else 1
        query = unit(self.projector(tokens[self.query].cls.chunk(crops)[0]))  # [B, d]
        with torch.no_grad():
            key = unit(self.teacher_projector(tokens[self.key].cls.chunk(crops)[-1]))  # [B, d]
        loss = queue_nce(query, key, self.queue.read(), self.cfg.temperature)
        self.queue.push(key)
        return {
            "loss": loss,
            "similarity": mean_cosine(query.detach(), key),
            "chance": torch.full_like(loss.detach(), math.log(1 + self.cfg.queue)),
        }

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_projector, self.projector),)
