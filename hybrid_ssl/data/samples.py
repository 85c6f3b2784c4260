"""From the numbers of a micro-batch to the `Batch`: read, decode once, cut all views, draw all masks.

A broken image is replaced by another one that is a function of (seed, epoch, sample); the random numbers stay those
of the sample it stands for, so that no two samples of an epoch share them.

Shapes: B images of a micro-batch, V crops of a view, N tokens; views uint8 [V*B, C, H, W], view-major; masks [V*B,
N].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import Batch
from .corrupt import corrupt
from .decode import Decoder
from .dirichlet import mask_grid
from .masks import make_mask, stratified_shares
from .modalities import Modalities
from .multiblock import draw_multiblock, draw_sizes
from .order import MicroBatch, key, keyed
from .settings import BlockMask, MaskSettings, MultiBlockMask
from .sources import Images
from .streams import Item, Stream
from .views import Views

_REPLACEMENTS = 20  # so many broken images one after another mean that all are
_KEPT_BYTES = 128 * 2**20  # decoded pictures that one process keeps: all of Fashion-MNIST or CIFAR, nothing of ImageNet


class Broken(NamedTuple):
    """An image that could not be read."""

    id: int
    name: str
    reason: str


class Row(NamedTuple):
    """One image: its number, pixels uint8 [C, H, W], label, and maps of its other modalities by name."""

    id: int
    image: Tensor
    label: int | None
    maps: Mapping[str, Tensor]


@dataclass
class Samples:
    """Builds the `Batch` of a `MicroBatch`: a pure function that remembers broken images and small decoded ones."""

    source: Images | Stream
    decoder: Decoder
    views: Views
    masks: Mapping[str, MaskSettings]
    grids: Mapping[str, tuple[int, int]]
    stride: int
    starts: Mapping[str, float]
    """mask -> the step from which it hides anything"""
    seed: int
    batch_size: int
    """images of an optimizer step, over which the shares of a stratified mask are spread"""
    modalities: Modalities

    def __post_init__(self) -> None:
        self._broken: set[int] = set()
        self._kept: dict[int, tuple[Tensor, int | None]] = {}
        settings = self.views.settings
        clean = {view.like for view in settings.values() if view.corrupt and view.like}
        self._donors = {name: Views({name: settings[name]}, self.views.jitter) for name in clean}

    def build(self, micro: MicroBatch) -> tuple[Batch, tuple[Broken, ...]]:
        """Decode once per image, cut all views, draw all masks."""
        broken: list[Broken] = []
        rows = [self._image(micro, i, broken) for i in micro.ids]
        drawn = [
            self.views(row.image, self.seed, micro.epoch, i, partial(self.modalities.cut, row.image, row.maps))
            for i, row in zip(micro.ids, rows, strict=True)
        ]
        pixels = [self._corrupt(each, micro, i, broken) for i, each in zip(micro.ids, drawn, strict=True)]
        views = {name: torch.stack([each[name] for each in drawn], 1).flatten(0, 1) for name in drawn[0]}
        masks: dict[str, Tensor] = {}
        for name in self.masks:
            masks |= self._masks(name, micro)
        labels = [row.label for row in rows if row.label is not None]
        batch = Batch(
            views=views,
            masks=masks | {name: _view_major([list(each[name]) for each in pixels]) for name in pixels[0]},
            labels=torch.tensor(labels) if len(labels) == len(rows) else None,
            ids=torch.tensor([row.id for row in rows]),
            hidden={name: mask.flatten().nonzero().squeeze(1) for name, mask in masks.items()},
        )
        return batch, tuple(broken)

    def _image(self, micro: MicroBatch, wanted: int, broken: list[Broken]) -> Row:
        """What is known of the image `wanted`; of a replacement if it is broken."""
        i = wanted
        problem = Broken(i, "", "known to be broken")
        for attempt in range(_REPLACEMENTS):
            if i not in self._broken:
                try:
                    image, label = self._read(micro, i)
                    return Row(i, image, label, self.modalities.read(i, (image.shape[1], image.shape[2])))
                except ValueError as error:
                    problem = Broken(i, self._name(micro, i), str(error))
                    self._broken.add(i)
                    broken.append(problem)
            draw = key(self.seed, micro.epoch, wanted, f"replacement {attempt}")
            i = draw % len(self.source) if micro.items is None else micro.ids[draw % len(micro.ids)]
        raise ValueError(f"{_REPLACEMENTS} images in a row are broken, the last one {problem.name}: {problem.reason}")

    def _read(self, micro: MicroBatch, i: int) -> tuple[Tensor, int | None]:
        if i in self._kept:
            return self._kept[i]
        if isinstance(self.source, Stream):
            item = self._item(micro, i)
            return self.decoder(self.source.load(item.ref)), item.label
        payload, label = self.source.read(i)
        image = self.decoder(payload)
        if image.numel() * len(self.source) <= _KEPT_BYTES:
            self._kept[i] = image, label
        return image, label

    def _corrupt(self, crops: dict[str, Tensor], micro: MicroBatch, i: int, broken: list[Broken]) -> dict[str, Tensor]:
        """Add the corrupted views to the crops of image `i`; returns where they are: bool [V, h * w] by mask name."""
        where = {}
        for name, view in self.views.settings.items():
            if view.corrupt is None or view.like is None:
                continue
            rng = keyed(self.seed, micro.epoch, i, f"{name}/corrupt")
            donor = self._donor(view.like, micro, i, rng, broken) if rng.random() < view.corrupt.replace else None
            crops[name], where[f"{name}.pixels"] = corrupt(crops[view.like], donor, view.corrupt, rng)
        return where

    def _donor(self, view: str, micro: MicroBatch, i: int, rng: Random, broken: list[Broken]) -> Tensor | None:
        """The view of another image, as it looks in this epoch: of the whole data set, but of the micro-batch when it
        is streamed. None: there is no other image."""
        everyone = range(len(self.source)) if micro.items is None else micro.ids
        own = everyone.index(i)
        if len(everyone) == 1:
            return None
        donor = everyone[(own + 1 + int(rng.random() * (len(everyone) - 1))) % len(everyone)]
        row = self._image(micro, donor, broken)
        if row.id == i:  # the donor is broken, and this image would stand in for it
            return None
        return self._donors[view](row.image, self.seed, micro.epoch, donor)[view]

    def _name(self, micro: MicroBatch, i: int) -> str:
        return self._item(micro, i).name if isinstance(self.source, Stream) else self.source.name(i)

    @staticmethod
    def _item(micro: MicroBatch, i: int) -> Item:
        assert micro.items is not None
        return micro.items[micro.ids.index(i)]

    def _masks(self, name: str, micro: MicroBatch) -> dict[str, Tensor]:
        """bool [V*B, N], view-major like the views; of a multiblock mask also `name.targets`, bool [V*B, T, N]."""
        mask, grid = self.masks[name], mask_grid(self.masks[name], self.grids)
        crops = range(self.views.settings[mask.view].crops)
        generators = [keyed(self.seed, micro.epoch, i, f"mask {name}") for i in micro.ids]
        if isinstance(mask, MultiBlockMask):
            sizes = draw_sizes(mask, grid, keyed(self.seed, 0, micro.step, f"sizes {name}"))
            pairs = [[draw_multiblock(mask, grid, sizes, rng) for _ in crops] for rng in generators]
            hidden, targets = ([[pair[k] for pair in row] for row in pairs] for k in range(2))
            return {name: _view_major(hidden), f"{name}.targets": _view_major(targets)}
        active = micro.step >= self.starts[name]
        shares: list[float | None] = [None] * (len(crops) * self.batch_size)
        if isinstance(mask, BlockMask) and mask.stratified:
            shares = list(stratified_shares(mask, len(shares), keyed(self.seed, 0, micro.step, f"shares {name}")))
        drawn = [
            [make_mask(mask, grid, self.stride, rng, active, share) for share in shares[place :: self.batch_size]]
            for place, rng in enumerate(generators, micro.place)
        ]
        return {name: _view_major(drawn)}


def _view_major(drawn: list[list[Tensor]]) -> Tensor:
    """For each image its crops' tensors -> one tensor [V*B, ...]."""
    return torch.stack([torch.stack(row) for row in drawn], 1).flatten(0, 1)
