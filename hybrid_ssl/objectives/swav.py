"""SwAV: predict from each crop the cluster assignment of another crop of the image, all clusters used about equally.

Source: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882.
Written from the paper and a fact sheet; checked against an independent computation and lightly's loss.

    loss = mean over (global crop i, any crop v != i) of cross-entropy(code_i, softmax(z_v . c / tau))
    code_i = Sinkhorn(z_i . c / epsilon), for each global crop by itself, over the images of all processes

With small batches a queue of earlier embeddings takes part in the balancing, scored with the current prototypes: filled
from `queue_starts` on, used once it is full. Here it holds the embeddings of all processes, equal on each, of which
each scores its share: the same set as a queue for each process, and a checkpoint of one process has it all. With
gradient accumulation it fills sooner than it is used, and holds micro-batches.

Prototypes are normalised in the forward pass instead of in place before each step. Both start at length 1 and give the
same loss; here the gradient has no radial part, and lengths may grow (the official ones are set back to 1), which slows
their turning a little. Their gradients are dropped for the first epoch (`hold_prototypes`). The head's BatchNorm sees
all crops in one call. Stuck at ln K: lower `epsilon` to 0.03, or hold longer.

Swin: yes, with windows that divide both crop sizes. Shapes: B images on this process, T global crops, S crops in all
(global ones first), d head width, K prototypes, Q queued rows on this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from pydantic import Field
from torch import Tensor

from ..nn.contrast import unit
from ..nn.distributed import rank, world_size
from ..nn.heads import Mlp
from ..nn.prototypes import Prototypes
from ..nn.queue import Queue
from ..nn.swapped import swav_loss
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from ..schedule import Duration, to_steps
from .base import Objective, ObjectiveSettings, ParamRule
from .dino import count_views, target_metrics


class SwAVSettings(ObjectiveSettings):
    """Defaults: the paper's for batches of 4096."""

    global_view: str = "global"
    """large crops (paper: 2), which give codes"""
    local_view: str | None = "local"
    """small crops (paper: 6), which only predict; null: global crops only"""
    prototypes: int = Field(3000, ge=2)
    """K; about three times the number of classes one expects"""
    temperature: float = Field(0.1, gt=0)
    epsilon: float = Field(0.05, gt=0)
    """temperature of the assignment; smaller: sharper codes"""
    iterations: int = Field(3, ge=1)
    """of Sinkhorn"""
    hidden: int = Field(2048, ge=1)
    dim: int = Field(128, ge=1)
    """width of embeddings and prototypes"""
    hold_prototypes: Duration = "1 epochs"
    """how long the prototypes' gradients are dropped"""
    queue: int = Field(0, ge=0)
    """embeddings of earlier images kept for each global crop, over all processes (paper: 3840 for batches of 256)"""
    queue_starts: Duration = "15 epochs"
    """when the queue begins to fill"""


class SwAV(Objective):
    """Swap cluster assignments between crops."""

    Config = SwAVSettings

    def __init__(self, cfg: SwAVSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.whole = Forward("student", cfg.global_view)
        self.local = None if cfg.local_view is None else Forward("student", cfg.local_view)
        self.needs = tuple(need for need in (self.whole, self.local) if need)
        self.targets, self.views = count_views(encoder, cfg.global_view, cfg.local_view)
        dims = (encoder.dim, cfg.hidden, cfg.dim)
        self.projector = Mlp(dims, last_norm="none", bias=True, last_bias=True)
        self.prototypes = Prototypes(cfg.dim, cfg.prototypes)
        with torch.no_grad():
            self.prototypes.weight.copy_(unit(self.prototypes.weight))
        self.queue = Queue(cfg.queue, self.targets * cfg.dim) if cfg.queue else None

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `chance`: ln K, the loss when all embeddings are one; `kl`, `teacher_entropy` and `teacher_spread`:
        as in DINO, of the codes."""
        crops = torch.cat([tokens[need].cls for need in self.needs])
        rows = unit(self.projector(crops))  # [S*B, d]
        logits = self.prototypes(rows).unflatten(0, (self.views, -1))  # [S, B, K]
        embedded = rows.detach().unflatten(0, (self.views, -1))[: self.targets]  # [T, B, d]
        queued = self._queued(now, embedded.shape[1])
        loss, codes = swav_loss(
            logits, self.targets, queued, self.cfg.temperature, self.cfg.epsilon, self.cfg.iterations
        )
        if self.queue is not None and self._steps_queued(now) >= 0:
            self.queue.push(embedded.transpose(0, 1).flatten(1))  # [B, T*d]
        chance = torch.full_like(loss.detach(), math.log(self.cfg.prototypes))
        return {"loss": loss, "chance": chance, **target_metrics(loss, codes.flatten(0, 1))}

    @torch.no_grad()
    def _queued(self, now: Progress, images: int) -> Tensor | None:
        """Logits [T, Q, K] of this process's share of the queue, once it is full."""
        pushes = math.ceil(self.cfg.queue / (images * world_size()))
        if self.queue is None or self._steps_queued(now) < pushes:  # a step pushes at least once; no device is asked
            return None
        share = self.queue.read().tensor_split(world_size())[rank()].unflatten(1, (self.targets, -1))  # [Q, T, d]
        logits: Tensor = self.prototypes(share)
        return logits.transpose(0, 1)

    def _steps_queued(self, now: Progress) -> float:
        return now.step - to_steps(self.cfg.queue_starts, now.total_steps, now.steps_per_epoch)

    def param_rules(self) -> Iterable[ParamRule]:
        return (ParamRule(tuple(self.prototypes.parameters()), hold=self.cfg.hold_prototypes),)
