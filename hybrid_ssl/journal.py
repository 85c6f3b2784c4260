"""What a run notices of itself: losses and speed of a log interval, skipped steps, signs of collapse; and its voice.

Only `report` waits for the device, once in a log interval. What is remembered goes into the checkpoint, so that a run
that is resumed inside an interval writes the same numbers as one that never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import Recipe
from .engine import total
from .monitor.collapse import CollapseWatch, FiniteGuard
from .monitor.log import RunLog
from .monitor.meter import Means, Meter
from .schedule import Progress


class Journal:
    """Log, meter, means and watchdogs of one run.

    Args:
        recipe: of the run.
        accelerator: the main process speaks and writes; sums are over all.
        total_steps: length of the run.
        dim: width of the features.
        compares_views: whether some objective compares views, so that features can collapse.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, total_steps: int, dim: int, compares_views: bool
    ) -> None:
        self.recipe, self.accelerator, self.total_steps = recipe, accelerator, total_steps
        self.meter = Meter(recipe.run.batch_size, total_steps)
        self.means = Means()
        self._finite: list[Tensor] = []  # one a step since the last report
        self._latest: dict[str, float] = {}  # means of the last log interval
        self._rates: dict[str, float] = {}
        self._guard = FiniteGuard(recipe.monitor.max_skipped, fp16=recipe.run.precision == "fp16")
        self._watch = CollapseWatch(recipe.monitor, dim, compares_views)
        self._log: RunLog | None = None

    @contextmanager
    def open(self, out: Path, start: int) -> Iterator[None]:
        """Write to the run's folder until the block ends, from step `start` on."""
        self.meter = Meter(self.recipe.run.batch_size, self.total_steps, start)
        config = self.recipe.model_dump(mode="json")
        main, trackers = self.accelerator.is_main_process, self.recipe.run.trackers
        with RunLog(out, self.total_steps, start, main=main, trackers=trackers, config=config) as self._log:
            try:
                yield
            finally:
                self._log = None

    @property
    def is_open(self) -> bool:
        return self._log is not None

    def say(self, text: str) -> None:
        """One line to the terminal, and to the log if there is one; of the main process only."""
        if self._log is not None:
            self._log.line(text)
        elif self.accelerator.is_main_process:
            print(text, flush=True)

    def step(self, norm: Tensor, rates: Mapping[str, float]) -> None:
        """An optimizer step is done: its gradient norm (not finite: it was skipped) and its rates."""
        self.means.add({"grad_norm": norm})
        self._finite.append(norm.isfinite())
        self._rates = dict(rates)
        self.meter.step()

    def advance(self, done: int) -> bool:
        """After `done` steps: move the bar, and report where it is due; True if the run must stop."""
        assert self._log is not None
        self._log.advance(done)
        due = done % self.recipe.monitor.log_every == 0 or done == self.total_steps
        return due and self._report(done)

    def _report(self, done: int) -> bool:
        """Write the means of the interval; True if too many steps were skipped. The loop waits for the device here."""
        assert self._log is not None
        self._latest = self.means.read(total(self.accelerator))
        flags = torch.stack(self._finite).tolist()
        self._finite.clear()
        self._log.train(done, self._latest | self._rates, self.meter.read())
        for step, finite in enumerate(flags, start=done - len(flags)):
            problem = self._guard.saw(step, finite)
            if problem:
                self.say(f"stopped: {problem}")
                return True
        if not all(flags):
            self.say(f"skipped {flags.count(False)} steps with a non-finite loss or gradient before step {done}")
        return False

    def judge(self, now: Progress, results: Mapping[str, Mapping[str, float]], raw: float | None) -> bool:
        """Write a probe's results (network -> numbers; `raw`: k-NN of raw pixels); True if the run must stop."""
        assert self._log is not None
        numbers = {} if raw is None else {"raw_pixels/knn": raw}
        numbers |= {f"{net}/{name}": value for net, found in results.items() for name, value in found.items()}
        self._log.record(now.step, numbers)
        verdicts = self._watch.look(now, results, self._latest)
        for verdict in verdicts:
            self.say(f"{'stopped' if verdict.stop else 'warning'}: {verdict.sentence}")
        return any(verdict.stop for verdict in verdicts)

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON data; all processes call it."""
        return {
            "means": self.means.state(total(self.accelerator)),
            "finite": torch.stack(self._finite).tolist() if self._finite else [],
            "latest": {name: value for name, value in self._latest.items() if math.isfinite(value)},
            "guard": self._guard.state(),
            "watch": self._watch.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        device = self.accelerator.device
        if self.accelerator.is_main_process:  # the sums are those of all processes
            self.means.restore(state["means"], device)
        self._finite = [torch.tensor(flag, device=device) for flag in state["finite"]]
        self._latest = dict(state["latest"])
        self._guard.restore(state["guard"])
        self._watch.restore(state["watch"])
