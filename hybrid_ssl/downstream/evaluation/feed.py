"""Where heads get their batches from: features in memory, or the encoder, which looks at new crops in every epoch.

A plan is a list of (epoch, rows); all processes walk the same one. From memory every process takes whole batches; with
the encoder each one encodes its part of a batch, and the parts are put together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...data.order import permutation
from ...nn.distributed import gather_no_grad, rank, world_size
from ...schedule import Progress
from .embed import Embedder, Part
from .features import Split
from .images import Blocks, Wanted


class Step(NamedTuple):
    """One batch of a plan."""

    epoch: int
    rows: Tensor
    """int64 [b], of the split's readable images"""


class Feed(Protocol):
    """Features of rows of a split, by name, on the device."""

    def __call__(self, plan: Sequence[Step]) -> Iterator[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Stored:
    """Features in memory."""

    split: Split
    names: Collection[str]
    device: torch.device

    def __call__(self, plan: Sequence[Step]) -> Iterator[dict[str, Tensor]]:
        whole = {name: self.split.features[name] for name in self.names}
        for step in plan:
            yield {name: value[step.rows].to(self.device, non_blocking=True) for name, value in whole.items()}


@dataclass(frozen=True)
class Live:
    """The encoder itself."""

    embedder: Embedder
    blocks: Blocks
    rows: Tensor
    """of the split's readable images, their numbers in `blocks`"""
    wanted: Collection[Part]
    workers: int
    seed: int | None
    """of random crops; None: centre crops"""

    def __call__(self, plan: Sequence[Step]) -> Iterator[dict[str, Tensor]]:
        asked = []
        for step in plan:
            size = -(-len(step.rows) // world_size())
            mine = step.rows[rank() * size : (rank() + 1) * size]
            # in a last, small batch a process may have none: it encodes one that is cut off below
            asked.append(Wanted(self.rows[mine if len(mine) else step.rows[:1]], self.seed, step.epoch))
        pinned = self.embedder.device.type == "cuda"
        for step, block in zip(plan, self.blocks.load(asked, self.workers, pinned), strict=True):
            size = -(-len(step.rows) // world_size())
            found = self.embedder(block.images, self.wanted)
            yield {name: gather_no_grad(_filled(value, size))[: len(step.rows)] for name, value in found.items()}


def _filled(x: Tensor, size: int) -> Tensor:
    """Zeros behind the rows of `x`, up to `size` of them."""
    return torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) if len(x) < size else x


def training_plan(rows: Tensor, epochs: int, size: int, seed: int) -> list[Step]:
    """Whole batches in an order that depends on seed and epoch; what is left of an epoch is dropped."""
    size = min(size, len(rows))
    steps = len(rows) // size
    plan = []
    for epoch in range(epochs):
        order = rows[permutation(len(rows), seed, epoch)]
        plan += [Step(epoch, part) for part in order[: steps * size].split(size)]
    return plan


def testing_plan(rows: Tensor, size: int) -> list[Step]:
    """Every row once, in order."""
    return [Step(0, part) for part in rows.split(size)]


def progress(plan: Sequence[Step], number: int) -> Progress:
    """Where a plan is."""
    return Progress(number, len(plan), len(plan) // (plan[-1].epoch + 1))
