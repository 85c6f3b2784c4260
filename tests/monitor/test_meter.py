"""Pace and loss means: right numbers, pauses left out, one reading per interval."""

import math

import pytest
import torch

from hybrid_ssl.monitor.meter import Means, Meter


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def run(meter, clock, steps, wait=0.25, work=0.75):
    for _ in range(steps):
        with meter.waiting():
            clock.now += wait
        clock.now += work
        meter.step()


def test_pace_counts_global_images_and_waiting():
    clock = Clock()
    meter = Meter(64, 100, clock=clock)
    run(meter, clock, 10)
    pace = meter.read()
    assert pace.images_per_second == pytest.approx(64)
    assert pace.data_wait == pytest.approx(0.25)
    assert pace.seconds_left == pytest.approx(90)


def test_pauses_are_no_training_but_count_for_the_time_left():
    clock = Clock()
    meter = Meter(64, 100, clock=clock)
    run(meter, clock, 10)
    with meter.paused():
        clock.now += 20
    pace = meter.read()
    assert pace.images_per_second == pytest.approx(64)
    assert pace.seconds_left == pytest.approx(90 * 3)  # 1 s a step and 2 s a step for the probe


def test_resumed_run_counts_its_own_steps():
    clock = Clock()
    meter = Meter(8, 100, start=90, clock=clock)
    run(meter, clock, 5)
    assert meter.read() == pytest.approx((8, 0.25, 5))


def test_pace_forgets_a_slow_start():
    clock = Clock()
    meter = Meter(10, 1000, clock=clock)
    run(meter, clock, 1, work=99.75)
    first = meter.read().images_per_second
    for _ in range(20):
        run(meter, clock, 10)
        last = meter.read().images_per_second
    assert first == pytest.approx(0.1) and last == pytest.approx(10, rel=0.02)


def test_reading_before_the_first_step_is_no_error():
    assert Meter(8, 10).read().seconds_left == math.inf


def test_means_are_averages_since_the_last_reading():
    means = Means()
    means.add({"loss": torch.tensor(1.0, requires_grad=True), "mae/loss": torch.tensor(2.0)})
    means.add({"loss": torch.tensor(3.0), "mae/loss": torch.tensor([4.0])})
    assert means.read() == {"loss": 2.0, "mae/loss": 3.0}
    assert means.read() == {}


def test_means_leave_non_finite_steps_out():
    means = Means()
    for value in (1.0, math.nan, 3.0, math.inf):
        means.add({"loss": torch.tensor(value), "bad": torch.tensor(math.nan)})
    found = means.read()
    assert found["loss"] == 2.0 and math.isnan(found["bad"])


def test_means_take_names_that_come_and_go():
    means = Means()
    means.add({"a": torch.tensor(1.0)})
    means.add({"a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    assert means.read() == {"a": 2.0, "b": 5.0}


def test_means_over_processes_weigh_every_finite_step():
    means, other = Means(), torch.tensor([[4.0], [1.0]])
    means.add({"loss": torch.tensor(2.0)})
    means.add({"loss": torch.tensor(3.0)})
    assert means.read(lambda pair: pair + other) == {"loss": 3.0}


def test_adding_reads_nothing_from_the_device():
    means = Means()
    with torch.device("meta"):
        values = {"loss": torch.zeros(()), "b": torch.zeros(())}
    means.add(values)  # a meta tensor has no value: any reading would raise
    means.add(values)
