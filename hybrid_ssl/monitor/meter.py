"""How fast a run is, and what its losses are, without waiting for the device at every step.

Reading a tensor's value makes the processor wait until the device has computed it. Losses are therefore summed on the
device and read once per log interval; the times between two readings are then right too, since each reading waits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MEMORY = 0.7  # weight of the past at each reading: about the last three intervals count


class Pace(NamedTuple):
    """The speed over the last intervals."""

    images_per_second: float
    """over all processes, without the time for probes and checkpoints"""
    data_wait: float
    """share of that time in which the loop waited for data, 0 to 1"""
    seconds_left: float
    """until the last step, probes and checkpoints included as they came so far"""


class Meter:
    """Counts steps and time.

    Args:
        batch_size: images in one optimizer step over all processes.
        total_steps, start: length of the run, and steps done before this process began.
        clock: seconds; to be replaced in tests.
    """

    def __init__(
        self, batch_size: int, total_steps: int, start: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.batch_size, self.total_steps, self.start, self.steps = batch_size, total_steps, start, start
        self._clock, self._since, self._read_at = clock, clock(), start
        self._waited = self._paused = self._paused_ever = 0.0
        self._smooth = [0.0, 0.0, 0.0]  # steps, seconds, seconds waited for data

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around `next(loader)`: time spent waiting for data."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around a probe or a checkpoint: time that is no training."""
        began = self._clock()
        yield
        self._paused += self._clock() - began

    def step(self) -> None:
        """One optimizer step is done."""
        self.steps += 1

    def read(self) -> Pace:
        """The pace; call it right after a value was read from the device."""
        now = self._clock()
        new = (self.steps - self._read_at, now - self._since - self._paused, self._waited)
        self._smooth = [_MEMORY * old + x for old, x in zip(self._smooth, new, strict=True)]
        self._paused_ever += self._paused
        self._since, self._read_at, self._waited, self._paused = now, self.steps, 0.0, 0.0
        steps, seconds, waited = self._smooth
        if not steps or seconds <= 0:
            return Pace(0.0, 0.0, math.inf)
        each = seconds / steps + self._paused_ever / max(1, self.steps - self.start)
        return Pace(self.batch_size * steps / seconds, waited / seconds, each * (self.total_steps - self.steps))


class Means:
    """Averages of named scalars over a log interval, kept on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars. A non-finite one is left out, so that a skipped step does not spoil the interval."""
        if not values:
            return
        row = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        finite = row.isfinite()
        pair = torch.stack([torch.where(finite, row, 0.0), finite.float()])  # [2, names]: sum and count
        names = tuple(values)
        self._sums[names] = self._sums[names] + pair if names in self._sums else pair

    def state(self, reduce: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
        """What was added since the last reading, as JSON data; `reduce` as in `read` (the loop waits here)."""
        return [[*names, (reduce(pair) if reduce else pair).tolist()] for names, pair in self._sums.items()]

    def restore(self, state: list[Any], device: torch.device) -> None:
        """Continue from `state()`; of several processes one does, since it holds the sums of all."""
        self._sums = {tuple(names): torch.tensor(pair, device=device) for *names, pair in state}

    def read(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means since the last reading (the loop waits here); NaN for a name that was never finite.

        Args:
            reduce: sums a tensor over all processes; every process must then call `read`.
        """
        totals: dict[str, list[float]] = {}
        for names, pair in self._sums.items():
            both = (reduce(pair) if reduce else pair).tolist()
            for name, total, count in zip(names, *both, strict=True):
                old = totals.get(name, [0.0, 0.0])
                totals[name] = [old[0] + total, old[1] + count]
        self._sums = {}
        return {name: total / count if count else math.nan for name, (total, count) in totals.items()}
