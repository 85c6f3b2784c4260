"""Labelled images in blocks, read by loader processes; a block has the same images on any number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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


class Blocks(Dataset[Block]):
    """Blocks of a split by their rows.

    Args:
        samples: the split.
        shape: [C, H, W] of an image.
        pixels: whether small pictures are wanted.
    """

    def __init__(self, samples: LabelledImages, shape: tuple[int, int, int], pixels: bool) -> None:
        self.samples, self.shape, self.pixels = samples, shape, pixels

    def __getitem__(self, rows: Tensor) -> Block:
        images = torch.zeros(len(rows), *self.shape, dtype=torch.uint8)
        ok, broken = torch.ones(len(rows), dtype=torch.bool), []
        for place, row in enumerate(rows.tolist()):
            try:
                images[place] = self.samples.read(row, None)[0]
            except ValueError as problem:
                ok[place] = False
                broken.append(Broken(self.samples.name(row), str(problem)))
        # 8 bits: exact for images of at most 32 x 32, a quarter of the memory
        pixels = (small_pixels(images) * 255).round().to(torch.uint8) if self.pixels else None
        return Block(rows, images, pixels, ok, tuple(broken))

    def load(self, rows: Iterable[Tensor], workers: int, pinned: bool) -> Iterator[Block]:
        """Blocks of these rows, in this order."""
        loader = DataLoader(
            self,
            sampler=list(rows),  # type: ignore[arg-type]
            batch_size=None,  # an item is a block already
            collate_fn=_as_is,
            num_workers=workers,
            pin_memory=pinned,
            prefetch_factor=4 if workers else None,
        )
        yield from loader


def _as_is(block: Block) -> Block:
    return block
