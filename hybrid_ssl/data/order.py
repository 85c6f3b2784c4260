"""Order and randomness as functions: which images a micro-batch holds, and the generator of every sample.

Nothing here has a state. The order is a permutation from (seed, epoch); optimizer step s takes one slice of it;
micro-batch a of that step is a contiguous part of the slice and rank r a contiguous part of the micro-batch. One
process with 16 images, two with 8, and four accumulated micro-batches of 4 therefore see the same images in the same
step. Resume needs the step, and no worker or process count. A sample's random numbers come from a key of (seed,
epoch, sample, purpose), never from a global stream: forked workers that share one stream repeat each other's
augmentations.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


def key(seed: int, epoch: int, sample_id: int, purpose: str) -> int:
    """63 bits that depend on nothing but the arguments (63: torch and int64 take no more)."""
    text = f"{seed}/{epoch}/{sample_id}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def keyed(seed: int, epoch: int, sample_id: int, purpose: str) -> random.Random:
    """A private generator. Python's: its `random()` is the same in every version, and it costs 8 us to seed."""
    return random.Random(key(seed, epoch, sample_id, purpose))


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order of `n` images in `epoch`: int64 [n]."""
    generator = torch.Generator().manual_seed(key(seed, epoch, 0, "order"))
    return torch.randperm(n, generator=generator)


class MicroBatch(NamedTuple):
    """What a loader process has to build. Epoch and step travel with it: a live worker hears of nothing else."""

    step: int
    epoch: int
    ids: tuple[int, ...]
    items: tuple[Any, ...] | None = None
    """of a stream: where the images are, since they have no numbers"""
    place: int = 0
    """which image of the step's whole batch its first one is"""


class BatchOrder(Sampler[MicroBatch]):
    """One rank's micro-batches from `start` (an optimizer step) to infinity.

    Args:
        images: number of images of the source.
        batch_size: images of one optimizer step over all ranks and micro-batches.
        micro_batch: images of one forward pass of one rank.
        rank: this process, of `world` many.

    Raises:
        ValueError: if the batch does not divide, or is larger than the data.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        micro_batch: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        if batch_size % (micro_batch * world):
            raise ValueError(
                f"batch_size {batch_size} does not divide into micro-batches of {micro_batch} on {world} process(es): "
                f"choose a multiple of {micro_batch * world}"
            )
        if images < batch_size:
            raise ValueError(f"batch_size {batch_size} is more than the {images} images of the data: lower it")
        self.images, self.batch_size, self.micro_batch, self.seed = images, batch_size, micro_batch, seed
        self.rank, self.world, self.start = rank, world, start
        self.accumulation = batch_size // (micro_batch * world)
        self.steps_per_epoch = images // batch_size
        """the rest of the permutation is dropped; another epoch drops other images"""

    def __iter__(self) -> Iterator[MicroBatch]:
        step = self.start
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = permutation(self.images, self.seed, epoch)
            for batch in range(first, self.steps_per_epoch):
                yield from self._split(step, epoch, order[batch * self.batch_size : (batch + 1) * self.batch_size])
                step += 1

    def _split(self, step: int, epoch: int, images: Tensor) -> Iterator[MicroBatch]:
        mine = images.view(self.accumulation, self.world, self.micro_batch)[:, self.rank]  # [A, m]
        for part, row in enumerate(mine.tolist()):
            yield MicroBatch(step, epoch, tuple(row), place=self._place(part))

    def _place(self, part: int) -> int:
        """Where this rank's micro-batch number `part` of a step begins in the step's whole batch."""
        return (part * self.world + self.rank) * self.micro_batch
