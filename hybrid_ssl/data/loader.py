"""The loader: micro-batches of views and masks from any step on, the same bits with any number of workers.

A worker gets one `MicroBatch` (step, epoch, image numbers) and builds the whole `Batch` from it; what it returns
depends on nothing else, so order, resume and randomness need no state, and a worker that dies is replaced without a
trace. Broken images are reported with the batch, named and counted in the main process.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..plan import Batch
from ..schedule import to_steps
from .decode import Decoder
from .dirichlet import mask_grid
from .masks import hidden_count
from .modalities import Modalities
from .order import BatchOrder, MicroBatch
from .samples import Broken, Samples
from .settings import BlockMask, DataSettings, MaskSettings, ViewSettings, shown
from .sources import Images, Source
from .streams import Stream, StreamOrder
from .views import Views

_RESTARTS = 3


class _Built(NamedTuple):
    """What a worker sends: the batch, or what went wrong as text, and the broken images that are new to it."""

    batch: Batch | None
    broken: tuple[Broken, ...]
    problem: str = ""
    users: bool = False
    """the problem is the user's to solve"""


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
            hidden_count(mask, mask_grid(mask, grids), stride)  # refuses what does not fit, before a worker does
        starts = {name: _start(mask, total_steps, self.steps_per_epoch) for name, mask in masks.items()}
        decoder = Decoder.of(data)
        maps = shown((view.modality for view in views.values()), data.modalities)
        self.samples = Samples(
            source,
            decoder,
            Views(views, data.jitter),
            dict(masks),
            dict(grids),
            stride,
            starts,
            seed,
            batch_size,
            Modalities(maps, source, decoder, data.split),
        )
        self.max_broken, self.workers, self.pin_memory, self.on_broken = data.max_broken, workers, pin_memory, on_broken
        self.broken: dict[int, Broken] = {}
        """images that could not be read, by number"""

    def preview(self, images: int) -> Batch:
        """The first `images` of the run's first micro-batch, built in this process: to look at."""
        micro = next(iter(self._order(self.samples.source, 0)))
        items = None if micro.items is None else micro.items[:images]
        return self.samples.build(micro._replace(ids=micro.ids[:images], items=items))[0]

    def iterate(self, step: int = 0) -> Iterator[Batch]:
        """`accumulation` micro-batches for every optimizer step from `step` on, without end.

        A loader process that dies is replaced, and the batches go on where they were, at most three times in a row.

        Raises:
            ValueError: more than `data.max_broken` of the images are broken (of several processes none decides alone,
                see `engine.StopSignal.agreed`), or too many in a row.
            RuntimeError: a bug, with its traceback, or loader processes that keep dying.
        """
        done = deaths = 0
        while True:
            begin, skip = divmod(done, self.accumulation)
            try:
                for built in islice(self._workers(step + begin), skip, None):
                    yield self._unpack(built)
                    done, deaths = done + 1, 0
            except (RuntimeError, OSError, EOFError) as problem:  # the last two: its tensors died with it
                if not self.workers or (isinstance(problem, RuntimeError) and "DataLoader worker" not in str(problem)):
                    raise
                deaths += 1
                if deaths > _RESTARTS:
                    raise RuntimeError(
                        f"loader processes died {deaths} times in a row at step {step + begin}: {problem} If memory is "
                        "short, lower run.workers or run.micro_batch"
                    ) from problem

    def _workers(self, step: int) -> Iterator[_Built]:
        loader = DataLoader(
            _Building(self.samples),
            sampler=self._order(self.samples.source, step),
            batch_size=None,  # an item is a micro-batch already
            collate_fn=_as_is,
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.workers else None,
        )
        before = signal.getsignal(signal.SIGCHLD)
        builds = iter(loader)
        if self.workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise wherever the training step is when a worker dies; `next` notices it within 5 s
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return builds

    def _unpack(self, built: _Built) -> Batch:
        self._note(built.broken)
        if built.batch is not None:
            return built.batch
        if built.users:
            raise ValueError(built.problem)
        raise RuntimeError(f"a batch could not be built:\n{built.problem}")

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
        if self._sizes["world"] == 1 and len(self.broken) > self.max_broken * images:
            last = list(self.broken.values())[-3:]
            raise ValueError(
                f"{len(self.broken)} of {images} images are broken, more than data.max_broken={self.max_broken:g}: "
                + "; ".join(f"{image.name} {image.reason}" for image in last)
            )


def _as_is(built: Any) -> Any:
    return built


def _start(mask: MaskSettings, total_steps: int, steps_per_epoch: int) -> float:
    return to_steps(mask.start, total_steps, steps_per_epoch) if isinstance(mask, BlockMask) else 0.0
