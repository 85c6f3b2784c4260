"""A run ends as it says: resumed to the bit, stopped by signals and NaN with its own exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_ssl.checkpoint import checkpoints, load
from hybrid_ssl.config import build_recipe, read_recipe
from hybrid_ssl.contract import check_resume
from hybrid_ssl.reading import parse_yaml
from hybrid_ssl.train import COLLAPSED, DONE, NON_FINITE, Run
from tests.runs import MAE_ENTRY, assert_same_bits, losses, newest_tensors, pretrain, recipe_data, write_recipe


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process while it trains `step`."""
    original = Run.step

    def stepped(self: Run, now: Any, batches: Any) -> None:
        original(self, now, batches)
        if now.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "step", stepped)


@pytest.mark.parametrize("objectives", ["mae+moco_v3", "dino+ibot"])
def test_resume_after_sigterm_equals_never_having_stopped(
    objectives: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = {"log_every": 3, "probe_every": None}  # the run is stopped inside a log interval and inside an epoch
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    path = write_recipe(tmp_path, recipe_data(whole, objectives, monitor=monitor))
    assert pretrain(path) == DONE
    with monkeypatch.context() as patch:
        signal_after(patch, step=4)
        assert pretrain(path, f"run.out={broken}") == 143
    assert "stopped by SIGTERM or SIGUSR1 at step 5 of 10; saved. Continue with --resume" in capsys.readouterr().out
    assert checkpoints(broken / "checkpoints")[0].name == "step-00000005"
    assert pretrain(path, f"run.out={broken}", "run.workers=2", "--resume") == DONE
    assert losses(broken) == losses(whole)
    assert_same_bits(newest_tensors(broken), newest_tensors(whole))


def test_resume_after_kill_9_equals_never_having_stopped(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = {"length": "40 steps", "checkpoint_every": "6 steps"}
    path = write_recipe(tmp_path, recipe_data(whole, "ibot", run=run))
    command = [sys.executable, "-m", "hybrid_ssl.cli", "pretrain", str(path), f"run.out={broken}", "run.workers=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not checkpoints(broken / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert pretrain(path) == DONE
    assert pretrain(path, f"run.out={broken}", "--resume") == DONE
    assert losses(broken) == losses(whole)
    assert_same_bits(newest_tensors(broken), newest_tensors(whole))


def test_sigint_has_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs are started with it ignored
    signal_after(monkeypatch, step=0, number=signal.SIGINT)
    assert pretrain(write_recipe(tmp_path, recipe_data(tmp_path / "run", {"mae": MAE_ENTRY}))) == 130
    assert signal.getsignal(signal.SIGINT) is before  # given back


def test_finished_run_that_is_resumed_trains_and_saves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = write_recipe(tmp_path, recipe_data(out, {"mae": MAE_ENTRY}, run={"length": "2 steps"}))
    assert pretrain(path) == DONE
    before, rows = newest_tensors(out), losses(out)
    assert pretrain(path, "--resume") == DONE
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-00000002", "step-00000001"]
    assert_same_bits(newest_tensors(out), before)
    assert losses(out) == rows


def poisoned(out: Path, *steps: int) -> dict[str, Any]:
    entry = MAE_ENTRY | {"name": "tests.runs:Poisoned", "poisoned": list(steps)}
    run = {"length": "6 steps", "checkpoint_every": "1 steps", "keep": 10}
    return recipe_data(out, {"mae": entry}, run=run)


def test_non_finite_step_is_skipped_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert pretrain(write_recipe(tmp_path, poisoned(out, 2, 4))) == DONE
    said = capsys.readouterr().out
    assert said.count("skipped 1 steps with a non-finite loss or gradient") == 2
    saved = {path.name: load(path) for path in checkpoints(out / "checkpoints")}
    for before, after in [(2, 3), (4, 5)]:  # moments and step counts stand still as well
        assert_same_bits(saved[f"step-{before:08d}"][0], saved[f"step-{after:08d}"][0])
    assert saved["step-00000006"][1]["journal"]["guard"]["total"] == 2
    assert losses(out)[3]["mae/loss"] is None  # NaN is no JSON
    assert all(t.isfinite().all() for t in newest_tensors(out).values())


def test_third_non_finite_step_in_a_row_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert pretrain(write_recipe(tmp_path, poisoned(out, 2, 3, 4))) == NON_FINITE
    said = capsys.readouterr().out
    assert "was not finite in 3 steps in a row, up to step 4; lower optimizer.lr" in said
    assert checkpoints(out / "checkpoints")[0].name == "step-00000004"
    assert all(t.isfinite().all() for t in newest_tensors(out).values())
    assert not (out / "encoder").exists()


def test_collapse_stops_the_run_after_saving_when_asked_to(tmp_path: Path) -> None:
    monitor = {"log_every": 1, "probe_every": "1 steps", "on_collapse": "stop", "collapse_std": 100.0}
    out = tmp_path / "run"
    assert pretrain(write_recipe(tmp_path, recipe_data(out, monitor=monitor))) == COLLAPSED
    newest = checkpoints(out / "checkpoints")[0]
    assert newest.name == "step-00000003"  # judged from a tenth of the run on, three probes in a row


def test_show_prints_a_recipe_that_reads_back_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, recipe_data(tmp_path / "run"))
    assert pretrain(path, "--show", "optimizer.lr=1e-5") == DONE
    said = capsys.readouterr().out
    assert build_recipe(parse_yaml(said, "show")) == read_recipe(path, ["optimizer.lr=1e-5"])
    assert "# plan: 3 encoder passes for 3 requested" in said
    assert not (tmp_path / "run").exists()


def test_dry_run_does_a_step_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, recipe_data(tmp_path / "run"))
    assert pretrain(path, "--dry-run") == DONE
    said = capsys.readouterr().out
    assert "dry run: one step done, loss " in said and "grad_norm" in said
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml"]


def test_run_says_how_batch_and_learning_rate_come_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, recipe_data(tmp_path / "run"))
    changes = ["run.batch_size=16", "run.micro_batch=4", "optimizer.lr_per=256", "optimizer.lr=1.6e-3"]
    assert pretrain(path, *changes, "--dry-run") == DONE
    said = capsys.readouterr().out
    assert "batch: 16 = 1 processes x 4 accumulated x 4" in said
    assert "lr 0.0016 x 16/256 = 0.0001; 10 steps, 4 an epoch" in said
    assert "accumulation: objectives that compare images see a micro-batch at a time" in said


def test_gradient_checkpointing_computes_the_same(tmp_path: Path) -> None:
    plain, saved = tmp_path / "plain", tmp_path / "saved"
    path = write_recipe(tmp_path, recipe_data(plain, run={"length": "3 steps"}))
    assert pretrain(path) == DONE
    assert pretrain(path, "run.gradient_checkpointing=true", f"run.out={saved}") == DONE
    assert losses(plain) == losses(saved)


@pytest.mark.parametrize("objectives", ["mae+moco_v3", "ibot"])
def test_bf16_trains_with_a_float32_teacher_and_optimizer(objectives: str, tmp_path: Path) -> None:
    exact, half = tmp_path / "exact", tmp_path / "half"
    path = write_recipe(tmp_path, recipe_data(exact, objectives, run={"length": "2 steps"}))
    assert pretrain(path) == DONE
    assert pretrain(path, "run.precision=bf16", f"run.out={half}") == DONE
    assert losses(half)[1]["loss"] == pytest.approx(losses(exact)[1]["loss"], rel=0.02)
    assert losses(half)[1]["loss"] != losses(exact)[1]["loss"]  # autocast was on
    assert {t.dtype for t in newest_tensors(half).values() if t.is_floating_point()} == {torch.float32}


def test_run_folder_holds_what_is_needed_to_repeat_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = write_recipe(tmp_path, recipe_data(out, {"mae": MAE_ENTRY}, run={"length": "2 steps"}))
    assert pretrain(path) == DONE
    assert read_recipe(out / "recipe.yaml") == read_recipe(path)
    environment = json.loads((out / "environment.json").read_text())
    assert {"hybrid_ssl", "torch", "timm", "accelerate", "hardware"} <= environment.keys()
    assert (out / "encoder" / "model.safetensors").is_file()


def test_exports_during_the_run_are_written_when_due(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, recipe_data(tmp_path / "run", {"mae": MAE_ENTRY}))
    assert pretrain(path, "export.every=4 steps") == DONE
    assert capsys.readouterr().out.count("encoder (student) written to") == 3  # steps 4, 8, 10


# what a resumed run may change


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose run has a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    out = folder / "run"
    run = {"length": "4 steps", "checkpoint_every": "2 steps"}
    path = write_recipe(folder, recipe_data(out, run=run))
    assert pretrain(path) == DONE
    return path


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("optimizer.lr=0.5", "optimizer.lr: was 0.001, is 0.5"),
        ("run.batch_size=16", "run.batch_size: was 8, is 16"),
        ("run.seed=1", "run.seed: was 0, is 1"),
        ("run.precision=bf16", "run.precision: was 'fp32', is 'bf16'"),
        ("objectives.moco_v3.temperature=0.1", "objectives.moco_v3.temperature: was 0.2, is 0.1"),
        ("data.limit=56", "the images (added, removed or changed files?): was "),
        ("run.micro_batch=4", "the number of micro-batches in a step: was 1, is 2"),
    ],
)
def test_changed_recipe_is_refused_with_the_difference(
    stopped: Path, change: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(stopped, change, "--resume") == 2
    message = capsys.readouterr().err
    assert sentence in message and "put it back, or start a new run in another run.out" in message


def test_what_only_carries_out_the_run_may_change(stopped: Path) -> None:
    free = ["run.workers=1", "run.keep=3", "monitor.log_every=7", "run.checkpoint_every=1 epochs", "run.threads=null"]
    assert pretrain(stopped, *free, "run.gradient_checkpointing=true", "export.licence=mit", "--resume") == DONE


def test_key_that_is_newer_than_the_checkpoint_counts_with_its_default(stopped: Path) -> None:
    recipe = read_recipe(stopped)
    before = recipe.model_dump(mode="json")
    del before["optimizer"]["eps"]
    check_resume(before, recipe, {}, {})
    with pytest.raises(ValueError, match=r"optimizer\.eps: was 1e-08, is 0\.1"):
        check_resume(before, read_recipe(stopped, ["optimizer.eps=0.1"]), {}, {})


def test_micro_batches_may_change_where_no_objective_compares_images(tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = write_recipe(tmp_path, recipe_data(out, {"mae": MAE_ENTRY}, run={"length": "2 steps"}))
    assert pretrain(path) == DONE
    assert pretrain(path, "run.micro_batch=4", "--resume") == DONE
