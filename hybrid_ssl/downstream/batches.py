"""Batches of a task: training in an order that depends on the step alone, testing with every sample once.

A sample's augmentation is drawn from (seed, epoch, sample), a batch's mixing from (seed, step, place), so a resumed
run, and one with other loader processes, sees the same pictures. A sample that cannot be read is named, counted and,
in training, replaced by the one after it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset

from ..data.order import BatchOrder, MicroBatch, keyed
from ..nn.distributed import gather_objects, world_size
from .task import Batch, Samples, Task

_REPLACEMENTS = 20  # samples tried in place of a broken one before giving up


class Broken(NamedTuple):
    """A sample that cannot be used."""

    name: str
    reason: str


class Loaded(NamedTuple):
    """What a loader process hands over."""

    batch: Batch | None
    """None: every sample of a test batch is broken, or no replacement was found for one of training"""
    broken: tuple[Broken, ...]


class TrainBatches(Dataset[Loaded]):
    """Training batches by `MicroBatch`."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, want: MicroBatch) -> Loaded:
        broken: list[Broken] = []
        samples = [self._read(i, want.epoch, broken) for i in want.ids]
        if any(sample is None for sample in samples):
            return Loaded(None, tuple(broken))
        images, targets = self.task.collate(samples)
        images, targets = self.task.mix(images, targets, keyed(self.seed, want.step, want.place, "mix"))
        return Loaded(Batch(images, targets, want.ids), tuple(broken))

    def _read(self, i: int, epoch: int, broken: list[Broken]) -> Any:
        source = self.task.train
        for attempt in range(_REPLACEMENTS):
            number = (i + attempt) % len(source)
            try:
                return source.read(number, keyed(self.seed, epoch, i, "augment"))
            except ValueError as problem:
                broken.append(Broken(source.name(number), str(problem)))
        return None


class TestBatches(Dataset[Loaded]):
    """Test batches by tuples of sample numbers."""

    __test__ = False  # not for pytest

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, ids: tuple[int, ...]) -> Loaded:
        samples, kept, broken = [], [], []
        for i in ids:
            try:
                samples.append(self.task.test.read(i, None))
                kept.append(i)
            except ValueError as problem:
                broken.append(Broken(self.task.test.name(i), str(problem)))
        batch = Batch(*self.task.collate(samples), tuple(kept)) if samples else None
        return Loaded(batch, tuple(broken))


class Counter:
    """The broken samples of one list: each is told once, too many end the run.

    Args:
        what: `training` or `test`.
        samples: the list.
        limit: share of them that may be broken.
        say: where a line goes to; called in the process that met the sample.
    """

    def __init__(self, what: str, samples: Samples, limit: float, say: Callable[[str], None]) -> None:
        self.what, self.samples, self.share, self.say = what, len(samples), limit, say
        self.limit = limit * self.samples
        self.names: dict[str, str] = {}

    def note(self, broken: Sequence[Broken]) -> None:
        """Count them; ValueError when there are too many, of several processes by agreement only (`check`)."""
        for each in broken:
            if each.name not in self.names:
                self.names[each.name] = each.reason
                self.say(f"left out, {self.what} sample {each.name}: {each.reason}")
        if world_size() == 1:
            self.check(len(self.names))

    def merge(self) -> None:
        """Every process learns what the others met; all call it."""
        for names in gather_objects(self.names):
            self.names |= names

    def check(self, count: int) -> None:
        """ValueError if `count`, of all processes, is too many."""
        if count > self.limit:
            last = "; ".join(f"{name}: {reason}" for name, reason in list(self.names.items())[-3:])
            raise ValueError(
                f"{count} of {self.samples} {self.what} samples are broken, more than "
                f"run.max_broken={self.share:g}: {last or 'other processes name them'}"
            )


def train_batches(
    task: Task, order: BatchOrder, *, workers: int, device: torch.device, counter: Counter
) -> Iterator[Batch]:
    """This process' micro-batches on the device, without end."""
    loader = _loader(TrainBatches(task, order.seed), order, workers, device)
    for loaded in loader:
        counter.note(loaded.broken)
        if loaded.batch is None:
            raise ValueError(f"{_REPLACEMENTS} training samples in a row cannot be read: {'; '.join(counter.names)}")
        yield send_to_device(loaded.batch, device, non_blocking=True)


def test_batches(
    task: Task, *, size: int, rank: int, world: int, workers: int, device: torch.device, counter: Counter
) -> Iterator[Batch]:
    """This process' share of the test set, on the device: every sample in exactly one process."""
    mine = range(rank, len(task.test), world)
    ids = [tuple(mine[begin : begin + size]) for begin in range(0, len(mine), size)]
    for loaded in _loader(TestBatches(task), ids, workers, device):
        counter.note(loaded.broken)
        if loaded.batch is not None:
            yield send_to_device(loaded.batch, device, non_blocking=True)


def _loader(dataset: Dataset[Loaded], sampler: Any, workers: int, device: torch.device) -> DataLoader[Loaded]:
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # an item is a batch already
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group is the run's to answer: it saves, with its loader processes still alive."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _as_is(loaded: Any) -> Any:
    return loaded
