"""Turns: contestants one after the other, round after round, in CPU seconds of this process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .contestants import OURS, build
from .work import Work

Turn = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class Spread:
    """Median and range of a quantity over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratios(peer: Sequence[float], ours: Sequence[float]) -> Spread:
    """The peer's seconds over ours, round by round: above 1, ours is faster."""
    return spread([theirs / own for theirs, own in zip(peer, ours, strict=True)])


def take_turns(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[Sequence[float]]]:
    """Every contestant once a round, after one round that is not counted; who begins changes from round to round."""
    seconds: dict[str, list[Sequence[float]]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            result = turns[name]()
            if number:
                seconds[name].append(result)
    return seconds


@dataclass(frozen=True)
class StepResult:
    """A peer's step over ours."""

    work: Work
    peer: str
    ours_seconds: float
    """median CPU seconds of our whole step"""
    step: Spread
    """ratio of whole steps: forward, backward, optimizer, teacher"""
    compute: Spread
    """ratio of forward and backward alone, which no choice of optimizer touches"""


def compare_steps(work: Work, peers: Sequence[str], rounds: int) -> list[StepResult]:
    """Train all side by side and compare each peer with ours."""
    seconds = take_turns({entry: _turn(entry, work) for entry in (OURS, *peers)}, rounds)
    totals = {entry: [sum(parts) for parts in turns] for entry, turns in seconds.items()}
    compute = {entry: [parts[0] for parts in turns] for entry, turns in seconds.items()}
    own = statistics.median(totals[OURS])
    return [
        StepResult(work, peer, own, ratios(totals[peer], totals[OURS]), ratios(compute[peer], compute[OURS]))
        for peer in peers
    ]


def _turn(entry: str, work: Work) -> Turn:
    trainer = build(entry, work)

    def turn() -> tuple[float, float]:
        start = time.process_time()
        trainer.forward_backward()
        middle = time.process_time()
        trainer.update()
        return middle - start, time.process_time() - middle

    return turn
