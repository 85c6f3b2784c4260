"""The loader: micro-batches of views and masks from any step on, the same bits with any number of workers.

A worker gets one `MicroBatch` (step, epoch, image numbers) and builds the whole `Batch` from it; what it returns
depends on nothing else, so order, resume and randomness need no state. A broken image is reported with the batch,
named and counted in the main process, and replaced by another image that is a function of (seed, epoch, sample); its
random numbers stay those of the sample it stands for, so that no two samples of an epoch share them.

Shapes: B images of a micro-batch, V crops of a view, N tokens; views uint8 [V*B, C, H, W], view-major; masks [V*B,
N].
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..plan import Batch
from ..schedule import to_steps
from .decode import Decoder
from .masks import hidden_count, make_mask
from .order import BatchOrder, MicroBatch, key, keyed
from .settings import BlockMask, DataSettings, MaskSettings, ViewSettings
from .sources import Images, Source
from .streams import Item, Stream, StreamOrder
from .views import Views

_REPLACEMENTS = 20  # so many broken images one after another mean that all are
_KEPT_BYTES = 128 * 2**20  # decoded pictures that one process keeps: all of Fashion-MNIST or CIFAR, nothing of ImageNet


class Broken(NamedTuple):
    """An image that could not be read."""

    id: int
    name: str
    reason: str


class _Built(NamedTuple):
    """What a worker sends: the batch, or what went wrong as text, and the broken images that are new to it."""

    batch: Batch | None
    broken: tuple[Broken, ...]
    problem: str = ""
    users: bool = False
    """the problem is the user's to solve"""


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

    def __post_init__(self) -> None:
        self._broken: set[int] = set()
        self._kept: dict[int, tuple[Tensor, int | None]] = {}

    def build(self, micro: MicroBatch) -> tuple[Batch, tuple[Broken, ...]]:
        """Decode once per image, cut all views, draw all masks."""
        broken: list[Broken] = []
        rows = [self._image(micro, place, broken) for place in range(len(micro.ids))]
        drawn = [self.views(row[0], self.seed, micro.epoch, i) for i, row in zip(micro.ids, rows, strict=True)]
        views = {
            name: torch.stack([each[name] for each in drawn], 1).flatten(0, 1) for name in drawn[0]
        }  # [V*B, C, h, w]
        masks = {name: self._masks(name, micro) for name in self.masks}
        labels = [label for _, _, label in rows if label is not None]
        batch = Batch(
            views=views,
            masks=masks,
            labels=torch.tensor(labels) if len(labels) == len(rows) else None,
            ids=torch.tensor([number for _, number, _ in rows]),
            hidden={name: mask.flatten().nonzero().squeeze(1) for name, mask in masks.items()},
        )
        return batch, tuple(broken)

    def _image(self, micro: MicroBatch, place: int, broken: list[Broken]) -> tuple[Tensor, int, int | None]:
        """The picture at `place`, its id and label; of a replacement if it is broken."""
        i = wanted = micro.ids[place]
        problem = Broken(i, "", "known to be broken")
        for attempt in range(_REPLACEMENTS):
            if i not in self._broken:
                try:
                    image, label = self._read(micro, i)
                    return image, i, label
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

    def _name(self, micro: MicroBatch, i: int) -> str:
        return self._item(micro, i).name if isinstance(self.source, Stream) else self.source.name(i)

    @staticmethod
    def _item(micro: MicroBatch, i: int) -> Item:
        assert micro.items is not None
        return micro.items[micro.ids.index(i)]

    def _masks(self, name: str, micro: MicroBatch) -> Tensor:
        """bool [V*B, N], view-major like the views."""
        mask = self.masks[name]
        active = micro.step >= self.starts[name]
        crops = range(self.views.settings[mask.view].crops)
        drawn = []
        for i in micro.ids:
            rng = keyed(self.seed, micro.epoch, i, f"mask {name}")
            drawn.append(torch.stack([make_mask(mask, self.grids[mask.view], self.stride, rng, active) for _ in crops]))
        return torch.stack(drawn, 1).flatten(0, 1)


class _Building(Dataset[_Built]):
    """`Samples` as torch's DataLoader wants it: an item is a whole micro-batch, errors travel as text."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, micro: MicroBatch) -> _Built:
        threads = torch.get_num_threads()
        if threads > 1:  # as in a worker: sums split over threads would differ in the last bit
            torch.set_num_threads(1)
        try:
            return _Built(*self.samples.build(micro))
        except ValueError as problem:
            return _Built(None, (), str(problem), users=True)
        except Exception:
            return _Built(None, (), traceback.format_exc())
        finally:
            if threads > 1:
                torch.set_num_threads(threads)


class Loader:
    """Micro-batches of one process, on the CPU, from any step to infinity.

    Args:
        source: the images.
        data: the recipe's section (channels, range, limits, jitter).
        views, masks: of the recipe.
        grids: view -> (rows, columns) of the encoder's output tokens.
        stride: pixels of one output token's side.
        batch_size: images of an optimizer step over all processes and micro-batches.
        micro_batch: images of one forward pass of this process.
        total_steps: of the run; needed only by a mask that starts after a percentage.
        on_broken: called once for each broken image, in the main process.

    Raises:
        ValueError: batch, mask or view that does not fit.
    """

    def __init__(
        self,
        source: Source,
        data: DataSettings,
        views: Mapping[str, ViewSettings],
        masks: Mapping[str, MaskSettings],
        *,
        grids: Mapping[str, tuple[int, int]],
        stride: int,
        batch_size: int,
        micro_batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        total_steps: int = 0,
        pin_memory: bool = False,
        on_broken: Callable[[Broken], None] | None = None,
    ) -> None:
        micro_batch = micro_batch or max(1, batch_size // world)
        assert isinstance(source, Images | Stream)
        self._sizes = {"batch_size": batch_size, "micro_batch": micro_batch, "seed": seed, "rank": rank, "world": world}
        order = self._order(source, 0)
        self.steps_per_epoch, self.accumulation = order.steps_per_epoch, order.accumulation
        for mask in masks.values():
            hidden_count(mask, grids[mask.view], stride)  # refuses what does not fit, before a worker does
        starts = {name: _start(mask, total_steps, self.steps_per_epoch) for name, mask in masks.items()}
        self.samples = Samples(
            source, Decoder.of(data), Views(views, data.jitter), dict(masks), dict(grids), stride, starts, seed
        )
        self.max_broken, self.workers, self.pin_memory, self.on_broken = data.max_broken, workers, pin_memory, on_broken
        self.broken: dict[int, Broken] = {}
        """images that could not be read, by number"""

    def iterate(self, step: int = 0) -> Iterator[Batch]:
        """`accumulation` micro-batches for every optimizer step from `step` on, without end.

        Raises:
            ValueError: more than `data.max_broken` of the images are broken.
        """
        order = self._order(self.samples.source, step)
        builds: Iterable[_Built] = DataLoader(
            _Building(self.samples),
            sampler=order,
            batch_size=None,  # an item is a micro-batch already
            collate_fn=_as_is,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.workers else None,
        )
        for built in builds:
            self._note(built.broken)
            if built.batch is None:
                if built.users:
                    raise ValueError(built.problem)
                raise RuntimeError(f"a batch could not be built:\n{built.problem}")
            yield built.batch

    def _order(self, source: Images | Stream, start: int) -> BatchOrder:
        if isinstance(source, Stream):
            return StreamOrder(source, **self._sizes, start=start)
        return BatchOrder(len(source), **self._sizes, start=start)

    def _note(self, broken: Iterable[Broken]) -> None:
        for image in broken:
            if image.id in self.broken:  # another worker met it first
                continue
            self.broken[image.id] = image
            if self.on_broken:
                self.on_broken(image)
        images = len(self.samples.source)
        if len(self.broken) > self.max_broken * images:
            last = list(self.broken.values())[-3:]
            raise ValueError(
                f"{len(self.broken)} of {images} images are broken, more than data.max_broken={self.max_broken:g}: "
                + "; ".join(f"{image.name} {image.reason}" for image in last)
            )


def _as_is(built: Any) -> Any:
    return built


def _start(mask: MaskSettings, total_steps: int, steps_per_epoch: int) -> float:
    return to_steps(mask.start, total_steps, steps_per_epoch) if isinstance(mask, BlockMask) else 0.0
