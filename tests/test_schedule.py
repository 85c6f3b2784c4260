"""Durations and ramps say what the papers' tables say."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from hybrid_ssl.schedule import Duration, Progress, Ramp, Value, to_steps, value_at, within
from hybrid_ssl.settings import Settings


class Holder(Settings):
    value: Annotated[Value, within(0, 3)]


STEPS, EPOCH = 60, 5  # 12 epochs of 5 steps


def at(step: int) -> Progress:
    return Progress(step, STEPS, EPOCH)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("40 epochs", 200),
        ("1 epoch", 5),
        ("0.5 epochs", 2.5),
        ("7 steps", 7),
        ("1 step", 1),
        ("5%", 3),
        ("1e2 steps", 100),
    ],
)
def test_duration_counts_optimizer_steps(text: str, steps: float) -> None:
    assert to_steps(text, STEPS, EPOCH) == pytest.approx(steps)


@pytest.mark.parametrize(
    "text", ["40", "epochs", "-1 epochs", "5 percent", "1e99 steps", "nan steps", "3 epochs 2 steps", ""]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="duration"):
        TypeAdapter(Duration).validate_python(text)


def test_linear_ramp_ends_after_its_duration_and_stays() -> None:
    ramp = Ramp(start=1.0, end=3.0, over="10 steps", after="20%")  # steps 12 to 22
    values = [ramp.at(at(step)) for step in (0, 12, 17, 22, 59)]
    assert values == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])


def test_cosine_ramp_is_the_momentum_of_dino_and_moco_v3() -> None:
    ramp = Ramp(start=0.996, end=1.0, shape="cosine")
    steps = np.arange(STEPS)
    dino = 1.0 + 0.5 * (0.996 - 1.0) * (1 + np.cos(np.pi * steps / STEPS))  # cosine_scheduler without warm-up
    moco = 1.0 - 0.5 * (1.0 + np.cos(np.pi * steps / EPOCH / (STEPS / EPOCH))) * (
        1.0 - 0.996
    )  # of the fractional epoch
    got = [value_at(ramp, at(step)) for step in steps]
    np.testing.assert_allclose(got, dino, rtol=1e-14)
    np.testing.assert_allclose(got, moco, rtol=1e-14)


def test_ramp_per_epoch_is_dinos_table_of_teacher_temperatures() -> None:
    ramp = Ramp(start=0.04, end=0.07, over="4 epochs", per="epoch")
    table = np.concatenate((np.linspace(0.04, 0.07, 4), np.full(STEPS // EPOCH - 4, 0.07)))
    np.testing.assert_allclose([ramp.at(at(step)) for step in range(STEPS)], table.repeat(EPOCH), rtol=1e-14)


def test_ramp_per_epoch_waits_for_its_beginning() -> None:
    ramp = Ramp(start=0.0, end=1.0, after="2 epochs", over="3 epochs", per="epoch")
    assert [ramp.at(at(epoch * EPOCH)) for epoch in range(7)] == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_ramp_over_nothing_is_a_jump(per: str) -> None:
    ramp = Ramp.model_validate({"start": 1.0, "end": 2.0, "over": "0%", "after": "50%", "per": per})
    assert [ramp.at(at(step)) for step in (0, 29, 30, 59)] == [1.0, 1.0, 2.0, 2.0]


def test_value_is_a_number_or_a_ramp_and_finite() -> None:
    assert value_at(Holder.model_validate({"value": 2}).value, at(3)) == 2.0
    assert value_at(Holder.model_validate({"value": {"start": 0.0, "end": 1.0}}).value, at(30)) == 0.5
    for wrong in (True, "2", -1, {"start": math.nan, "end": 1.0}, {"start": 1.0}, {"start": 1.0, "end": 4}):
        with pytest.raises(ValidationError):
            Holder.model_validate({"value": wrong})


def test_progress_knows_epoch_and_share() -> None:
    now = at(15)
    assert (now.epoch, now.fraction) == (3.0, 0.25)
