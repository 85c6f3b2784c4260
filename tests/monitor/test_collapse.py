"""Verdicts: which sign, after how many probes, for which objectives, and with memory across a resume."""

import json

import pytest

from hybrid_ssl.monitor.collapse import CollapseWatch, FiniteGuard
from hybrid_ssl.monitor.settings import MonitorSettings
from hybrid_ssl.schedule import Progress

HEALTHY = {"knn": 0.7, "std": 0.8, "rank": 90.0, "rank_centred": 90.0}
POINT = HEALTHY | {"std": 0.003, "rank": 1.2}


def at(percent):
    return Progress(step=percent * 10, total_steps=1000, steps_per_epoch=100)


def watch(on_collapse="warn", joint=True, dim=192):
    return CollapseWatch(MonitorSettings(on_collapse=on_collapse), dim=dim, joint_embedding=joint)


def look(w, percent, numbers, metrics=None, net="teacher"):
    return w.look(at(percent), {net: numbers}, metrics)


def test_healthy_runs_hear_nothing():
    w = watch("stop")
    metrics = {
        "dino/loss": 5.0,
        "dino/teacher_entropy": 0.5,
        "dino/teacher_spread": 0.9,
        "dino/kl": 1.0,
        "dino/chance": 8.3,
    }
    assert [look(w, p, HEALTHY, metrics) for p in range(0, 101, 5)] == [[]] * 21


@pytest.mark.parametrize("mode", ["stop", "warn"])
def test_point_collapse_is_named_and_acted_on_at_the_third_probe_in_a_row(mode):
    w = watch(mode)
    said = [look(w, p, POINT) for p in (15, 20, 25, 30)]
    assert [len(v) for v in said] == [1, 0, 1, 0]
    assert said[0][0].kind == "teacher/point" and not said[0][0].stop
    assert said[2][0].stop == (mode == "stop")
    assert "collapsed to a point: normalised std 0.0030 (< 0.01)" in said[2][0].sentence
    assert "third probe in a row" in said[2][0].sentence


def test_a_healthy_probe_in_between_starts_the_count_again():
    w = watch("stop")
    said = [look(w, 10 + p, n) for p, n in enumerate([POINT, POINT, HEALTHY, POINT, POINT])]
    assert not any(v.stop for verdicts in said for v in verdicts)


def test_random_encoders_at_the_start_are_left_alone():
    w = watch("stop")
    assert [look(w, p, POINT) for p in (0, 3, 6, 9)] == [[]] * 4


def test_small_std_of_masked_image_models_is_no_sign():
    w = watch("stop", joint=False)
    assert [look(w, p, POINT) for p in (15, 20, 25)] == [[]] * 3


def test_shrinking_is_a_warning_by_level_and_by_the_runs_own_best():
    assert look(watch(), 20, HEALTHY | {"std": 0.04})[0].kind == "teacher/shrinking"
    w = watch()
    look(w, 20, HEALTHY)
    verdict = look(w, 25, HEALTHY | {"std": 0.15})[0]
    assert "its best was 0.800" in verdict.sentence and not verdict.stop


def test_few_directions_and_a_falling_rank():
    few = look(watch(), 20, HEALTHY | {"rank_centred": 3.5})[0]
    assert few.kind == "teacher/directions" and "3.5 (< 3.8)" in few.sentence
    w = watch()
    look(w, 20, HEALTHY)
    assert "fell from 90.0 to 40.0" in look(w, 25, HEALTHY | {"rank_centred": 40.0})[0].sentence


@pytest.mark.parametrize(
    ("metrics", "kind"),
    [
        ({"dino/teacher_entropy": 0.999, "dino/kl": 0.001}, "dino/uniform"),
        ({"dino/teacher_spread": 0.02}, "dino/one prototype"),
    ],
)
def test_teacher_collapse_warns_then_stops(metrics, kind):
    w = watch("stop")
    said = [look(w, p, HEALTHY, metrics) for p in (15, 20, 25)]
    assert said[0][0].kind == kind and [v.stop for verdicts in said for v in verdicts] == [False, True]


def test_uniform_teacher_that_still_teaches_is_fine():
    assert look(watch(), 20, HEALTHY, {"dino/teacher_entropy": 0.99, "dino/kl": 0.2}) == []


def test_loss_of_a_constant_answer_is_a_warning_only():
    w = watch("stop")
    said = [look(w, p, HEALTHY, {"simclr/loss": 4.14, "simclr/chance": 4.1431}) for p in (15, 20, 25)]
    assert said[0][0].kind == "simclr/constant" and said[1:] == [[], []]


def test_a_teacher_that_no_longer_follows():
    assert look(watch(), 20, HEALTHY | {"teacher_cosine": 0.02})[0].kind == "teacher/strangers"


def test_networks_are_counted_apart():
    w = watch("stop")
    for percent, net in ((15, "teacher"), (20, "student"), (25, "teacher")):
        assert not any(v.stop for v in look(w, percent, POINT, net=net))


def test_memory_survives_a_resume():
    first, second = watch("stop"), watch("stop")
    look(first, 15, POINT), look(first, 20, POINT)
    second.restore(json.loads(json.dumps(first.state())))
    assert look(second, 25, POINT)[0].stop
    assert second.state() != first.state()


def test_guard_stops_after_so_many_in_a_row():
    guard = FiniteGuard(3)
    said = [guard.saw(step, finite) for step, finite in enumerate([False, False, True, False, False, False])]
    assert said[:5] == [None] * 5 and "3 steps in a row, up to step 5" in said[5]
    assert guard.total == 5


def test_guard_stops_when_one_percent_is_lost():
    guard = FiniteGuard(3)
    said = [guard.saw(step, step % 50 != 0) for step in range(1000)]
    assert [step for step, text in enumerate(said) if text][0] == 500
    assert "11 of the last 1000" in said[500]
    spread = FiniteGuard(3)
    assert not any(spread.saw(step, step % 101 != 0) for step in range(5000))


def test_guard_forgives_the_loss_scaler_its_start():
    assert not any(FiniteGuard(3, fp16=True).saw(step, False) for step in range(20))
    assert FiniteGuard(1, fp16=True).saw(20, False)


def test_guard_memory_survives_a_resume():
    first, second = FiniteGuard(3), FiniteGuard(3)
    first.saw(1, False), first.saw(2, False)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.saw(3, False)
