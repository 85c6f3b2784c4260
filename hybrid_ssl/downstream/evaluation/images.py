"""Labelled images in blocks, read by loader processes; a block has the same images on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data.order import keyed
from ...monitor.probe import small_pixels
from ..batches import Broken
from ..classification.samples import LabelledImages


class Block(NamedTuple):
    """Some images of one split."""

    rows: Tensor
    """int64 [b], numbers of the images"""
    images: Tensor
    """uint8 [b, C, H, W], zeros where broken"""
    pixels: Tensor | None
    """uint8 [b, C * h * w], small pictures for the comparison with raw pixels"""
    ok: Tensor
    """bool [b], whether the image could be read"""
    broken: tuple[Broken, ...]


class Wanted(NamedTuple):
    """Which images a loader process has to read."""

    rows: Tensor
    """int64 [b]"""
    seed: int | None = None
    """None: centre crops; else random crops, drawn from (seed, epoch, image)"""
    epoch: int = 0


class Blocks(Dataset[Block]):
    """Blocks of a split.

    Args:
        samples: the split.
        shape: [C, H, W] of an image.
        pixels: whether small pictures are wanted.
    """

    def __init__(self, samples: LabelledImages, shape: tuple[int, int, int], pixels: bool) -> None:
        self.samples, self.shape, self.pixels = samples, shape, pixels

    def __getitem__(self, want: Wanted) -> Block:
        rows = want.rows
        images = torch.zeros(len(rows), *self.shape, dtype=torch.uint8)
        ok, broken = torch.ones(len(rows), dtype=torch.bool), []
        for place, row in enumerate(rows.tolist()):
            rng = None if want.seed is None else keyed(want.seed, want.epoch, row, "crop")
            try:
                images[place] = self.samples.read(row, rng)[0]
            except ValueError as problem:
                ok[place] = False
                broken.append(Broken(self.samples.name(row), str(problem)))
        return Block(rows, images, shrunk(images) if self.pixels else None, ok, tuple(broken))

    def load(self, wanted: Sequence[Wanted], workers: int, pinned: bool) -> Iterator[Block]:
        """Blocks in this order."""
        loader = DataLoader(
            self,
            sampler=wanted,
            batch_size=None,  # an item is a block already
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=pinned,
            prefetch_factor=4 if workers else None,
        )
        yield from loader


def shrunk(images: Tensor) -> Tensor:
    """uint8 [b, C, H, W] -> uint8 [b, C * h * w], at most 32 x 32; in 8 bits, a quarter of the memory."""
    return (small_pixels(images) * 255).round().to(torch.uint8)


def _as_is(block: Any) -> Any:
    return block
