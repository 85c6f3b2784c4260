"""Durations and values that change during a run, both written in the recipe.

A duration is text: `40 epochs`, `10000 steps` or `5%` (of the whole run). A value is a number, or a `Ramp` from one
number to another. Both are pure functions of the step, so a resumed run needs nothing restored.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from .settings import Settings

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+]?\d+)?)\s*(epochs?|steps?|%)\s*")


_LONGEST = 1e9  # of any unit; what is longer is a typing error


def _check_duration(text: str) -> str:
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no duration: write '40 epochs', '10000 steps' or '5%'")
    if float(match[1]) > _LONGEST:
        raise ValueError(f"{text!r} is too long for a duration: at most {_LONGEST:g} epochs, steps or percent")
    return text


Duration = Annotated[str, AfterValidator(_check_duration)]
"""Text such as `40 epochs`, `10000 steps`, `5%`."""


@dataclass(frozen=True)
class Progress:
    """Where a run is. Counts optimizer steps; the first one is step 0."""

    step: int
    total_steps: int
    steps_per_epoch: int
    seed: int = 0
    micro: int = 0
    """which micro-batch of the step, when gradients are accumulated"""

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.total_steps)


def to_steps(duration: str, total_steps: int, steps_per_epoch: int) -> float:
    """Length of `duration` in optimizer steps (a float: half an epoch of 5 steps is 2.5)."""
    match = _DURATION.fullmatch(duration)
    assert match, duration  # checked when the recipe was read
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return number / 100 * total_steps
    return number * steps_per_epoch if unit.startswith("epoch") else number


class Ramp(Settings):
    """A value that goes from `start` to `end`, e.g. a teacher temperature or a loss weight."""

    start: float
    end: float
    over: Duration = "100%"
    """how long the change takes; afterwards the value stays at `end`"""
    after: Duration = "0%"
    """how long the value stays at `start` first"""
    shape: Literal["linear", "cosine"] = "linear"
    per: Literal["step", "epoch"] = "step"
    """`epoch`: one value an epoch, `end` reached in the last epoch of `over` (DINO's teacher temperature)"""

    def at(self, now: Progress) -> float:
        lengths = (to_steps(text, now.total_steps, now.steps_per_epoch) for text in (self.after, self.over))
        after, over = lengths
        position: float = now.step - after
        if self.per == "epoch":
            position = math.floor(now.epoch + 1e-9) - after / now.steps_per_epoch
            over = over / now.steps_per_epoch - 1  # linspace(start, end, epochs), ends included
        done = 1.0 if over <= 0 and position >= 0 else min(1.0, max(0.0, position / over if over > 0 else 0.0))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


Value = Annotated[float | Ramp, Field(union_mode="left_to_right")]
"""A number, or a `Ramp`."""


def within(low: float, high: float) -> AfterValidator:
    """A limit for a `Value`, as in `Annotated[Value, within(0, 1)]`: a ramp keeps it at both ends."""

    def check(value: float | Ramp) -> float | Ramp:
        for end in (value.start, value.end) if isinstance(value, Ramp) else (value,):
            if not low <= end <= high:
                raise ValueError(f"should be from {low:g} to {high:g}, got {end:g}")
        return value

    return AfterValidator(check)


def value_at(value: Any, now: Progress) -> float:
    """`value` itself, or what the ramp says at this step."""
    return value.at(now) if isinstance(value, Ramp) else float(value)
