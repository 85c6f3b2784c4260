"""The run log: one line a step, cut on resume, plain off a terminal, silent off the main process, no credentials."""

import json

import pytest

from hybrid_ssl.monitor.log import RunLog, cut, duration, read_metrics
from hybrid_ssl.monitor.meter import Pace
from hybrid_ssl.monitor.redact import HIDDEN, flatten, redact
from hybrid_ssl.monitor.trackers import check_trackers

PACE = Pace(1234.4, 0.031, 754.0)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_a_step_and_null_for_non_finite(tmp_path):
    with RunLog(tmp_path, 10, terminal=False) as log:
        log.record(1, {"loss": 3.25})
        log.record(2, {"loss": float("nan")})
        log.record(2, {"knn": 0.5})
        log.record(3, {"loss": 1})
    assert rows(tmp_path) == [
        {"step": 1, "loss": 3.25},
        {"step": 2, "loss": None, "knn": 0.5},
        {"step": 3, "loss": 1.0},
    ]


def test_numbers_survive_exactly(tmp_path):
    value = 0.1 + 0.2
    with RunLog(tmp_path, 10, terminal=False) as log:
        log.record(1, {"loss": value})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == value


def test_resume_cuts_back_so_that_no_step_appears_twice(tmp_path):
    with RunLog(tmp_path, 10, terminal=False) as log:
        for step in range(1, 9):
            log.record(step, {"loss": step})
    with RunLog(tmp_path, 10, start=5, terminal=False) as log:
        log.record(5, {"knn": 0.7})  # adds to the line that stayed
        for step in range(6, 11):
            log.record(step, {"loss": -step})
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 11))
    assert found[4] == {"step": 5, "loss": 5.0, "knn": 0.7} and found[5]["loss"] == -6


def test_a_fresh_start_leaves_nothing_of_an_older_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "knn": 0.5}\n{"step": 3, "loss": 1.0}\n')
    RunLog(tmp_path, 10, terminal=False).close()
    assert rows(tmp_path) == []


def test_half_written_line_of_a_killed_run_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert cut(path, 9) == {"step": 1, "loss": 2.0}
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_steps_only_grow(tmp_path):
    with RunLog(tmp_path, 10, terminal=False) as log:
        log.record(4, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 3 was recorded after step 4"):
            log.record(3, {"loss": 1.0})


def test_off_a_terminal_there_are_plain_lines(tmp_path, capsys):
    with RunLog(tmp_path, 400, terminal=False) as log:
        log.advance(20)
        log.train(20, {"loss": 3.14159, "lr": 1.5e-4}, PACE)
        log.line("saved step-00000020")
    out = capsys.readouterr().out
    assert "\r" not in out
    assert out.splitlines() == [
        "step  20/400   5%  loss 3.142  lr 0.00015  1,234 images/s  data wait 3%  13 min left",
        "saved step-00000020",
    ]
    assert (tmp_path / "train.log").read_text() == out
    assert rows(tmp_path)[0]["images_per_second"] == 1234.4


def test_on_a_terminal_there_is_a_bar_and_the_file_has_the_lines(tmp_path, capsys):
    with RunLog(tmp_path, 400, terminal=True) as log:
        log.advance(20)
        log.train(20, {"loss": 3.14159}, PACE)
        log.line("saved")
    shown = capsys.readouterr()
    assert "20/400" in shown.err and "13 min left" in shown.err and "saved" in shown.out
    assert (tmp_path / "train.log").read_text().splitlines()[1] == "saved"


def test_other_processes_say_and_write_nothing(tmp_path, capsys):
    with RunLog(tmp_path / "run", 10, main=False, trackers=["tensorboard"]) as log:
        log.advance(1)
        log.record(1, {"loss": 1.0})
        log.train(2, {"loss": 1.0}, PACE)
        log.line("hello")
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_missing_tracker_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb, or leave it out; .*pip install mlflow"):
        check_trackers(["wandb", "mlflow"])
    with pytest.raises(ValueError, match="pip install trackio"):
        RunLog(tmp_path, 10, trackers=["trackio"])
    with pytest.raises(ValueError, match="allowed are tensorboard, wandb, trackio, mlflow"):
        check_trackers(["tensorbord"])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_gets_numbers_and_recipe_without_credentials(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {
        "run": {"seed": 1, "micro_batch": None},
        "data": {"source": ["https://me:canary1@host/x", "hf_" + "c" * 30]},
    }
    with RunLog(tmp_path, 10, trackers=["tensorboard"], config=config, terminal=False) as log:
        log.record(2, {"loss": 0.5, "bad": float("inf")})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 0.5)]
    assert events.Tags()["scalars"] == ["loss"]
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"run.seed" in text and HIDDEN.encode() in text
    assert b"canary1" not in text and b"cccc" not in text


def test_lines_hide_credentials(tmp_path, capsys):
    secrets = ["hf_" + "a" * 34, "https://user:pa55word@host/data", "https://bucket/x?X-Amz-Signature=abc123&y=1"]
    with RunLog(tmp_path, 10, terminal=False) as log:
        log.line(f"cannot open {' '.join(secrets)}")
    for text in (capsys.readouterr().out, (tmp_path / "train.log").read_text()):
        assert not any(part in text for part in ("aaaa", "pa55word", "abc123")) and "y=1" in text


def test_redaction_keeps_words_of_the_trade():
    assert redact("cls_token of hf_hub at https://host/a?size=3") == "cls_token of hf_hub at https://host/a?size=3"
    flat = flatten(
        {"encoder": {"args": {"cls_token": "yes", "reg_tokens": 4}}, "hub": {"token": "abc", "api_key": "x"}}
    )
    assert flat == {
        "encoder.args.cls_token": "yes",
        "encoder.args.reg_tokens": 4,
        "hub.token": HIDDEN,
        "hub.api_key": HIDDEN,
    }
    assert flatten({"a": None, "b": [1, 2], "c": True}) == {"a": "null", "b": "1, 2", "c": True}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (720, "12 min"), (11100, "3 h 05 min"), (187200, "2 d 4 h"), (float("inf"), "?")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text
