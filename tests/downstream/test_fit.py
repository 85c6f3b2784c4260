"""The fine-tuning loop: resumed to the same bits, broken samples replaced, results that say what was run."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hybrid_ssl import checkpoint
from hybrid_ssl.checkpoint import checkpoints
from hybrid_ssl.downstream.batches import Broken
from hybrid_ssl.downstream.classification.samples import LabelledImages
from hybrid_ssl.downstream.fit import Fit
from hybrid_ssl.downstream.stored import load_model
from tests.downstream.tiny import build, export_tiny, finetune
from tests.runs import assert_same_bits, losses, newest_tensors

ROOT = Path(__file__).parents[2]

SMALL = (
    "run.length=7 steps", "run.batch_size=8", "run.workers=0", "run.threads=1", "run.evaluate_every=3 steps",
    "data.size=16", "data.limit=40", "data.test_limit=16", "optimizer.lr_per=null", "optimizer.lr=1e-3",
    "export.verify=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("exported") / "encoder")


def run(encoder: Path, out: Path, *words: str) -> int:
    return finetune("classification", encoder, "--data", "embedded:fashion_mnist", "--out", out, *SMALL, *words)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def signal_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Fit.step

    def stepped(self: Fit, now: Any, batches: Any) -> None:
        original(self, now, batches)
        if now.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Fit, "step", stepped)


def test_a_checkpoint_that_lacks_a_newer_key_resumes(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        assert run(encoder, tmp_path / "out") == 143
    original = checkpoint.load

    def older(path: Path) -> Any:
        tensors, state = original(path)
        del state["recipe"]["head"]["pool"]
        return tensors, state

    monkeypatch.setattr(checkpoint, "load", older)
    assert run(encoder, tmp_path / "out", "--resume") == 0


def test_resume_after_sigterm_equals_never_having_stopped(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = ("ema=0.9", "encoder.drop_path=0.3", "run.micro_batch=4")
    assert run(encoder, whole, *settings) == 0
    with monkeypatch.context() as patch:
        signal_after(patch, step=3)
        assert run(encoder, broken, *settings) == 143
    assert checkpoints(broken / "checkpoints")[0].name == "step-00000004"
    assert not (broken / "results.json").exists()
    assert run(encoder, broken, *settings, "run.workers=2", "--resume") == 0
    assert_same_bits(newest_tensors(whole), newest_tensors(broken))
    assert results(whole)["history"] == results(broken)["history"]
    assert [row["step"] for row in results(whole)["history"]] == [3, 6, 7]


def test_what_is_stored_is_what_was_measured(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(encoder, out, "ema=0.5") == 0
    stored, last = load_file(out / "model" / "model.safetensors"), newest_tensors(out)
    averaged = {name.removeprefix("average.module."): t for name, t in last.items() if "average.module." in name}
    assert_same_bits(stored, averaged)
    assert any(not torch.equal(stored[name], last[f"model.{name}"]) for name in stored)
    assert_same_bits(dict(load_model(out).state_dict()), stored)


def test_results_name_the_encoder_and_no_private_path(encoder: Path, tmp_path: Path) -> None:
    assert run(encoder, tmp_path / "a") == 0 and run(encoder, tmp_path / "b", "--random", "--seed", "3") == 0
    found, random = results(tmp_path / "a"), results(tmp_path / "b")
    assert found["value"] == found["metrics"][found["metric"]] == found["history"][-1][found["metric"]]
    assert found["encoder"]["random"] is False and random["encoder"]["random"] is True and random["seed"] == 3
    assert found["steps"] == 7 and found["batch_size"] == 8 and found["seconds"] > 0
    for file in ("results.json", "model/config.json"):
        assert str(tmp_path) not in (tmp_path / "a" / file).read_text(), file
        assert str(encoder.parent) not in (tmp_path / "a" / file).read_text(), file


def test_frozen_encoder_stays_and_the_head_learns(encoder: Path, tmp_path: Path) -> None:
    assert run(encoder, tmp_path / "out", "encoder.frozen=true") == 0
    stored, start = load_file(tmp_path / "out" / "model" / "model.safetensors"), build("vit", 1, 16).state_dict()
    assert_same_bits({name: stored[f"encoder.{name}"] for name in start}, dict(start))
    head = [name for name in stored if "head." in name]
    assert head and all(stored[name].abs().max() > 0 for name in head)


def test_training_moves_every_layer_of_the_encoder(encoder: Path, tmp_path: Path) -> None:
    assert run(encoder, tmp_path / "out") == 0
    stored, start = load_file(tmp_path / "out" / "model" / "model.safetensors"), build("vit", 1, 16).state_dict()
    assert [name for name in start if torch.equal(stored[f"encoder.{name}"], start[name])] == []


def test_broken_samples_are_named_and_replaced(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = LabelledImages.read

    def read(self: LabelledImages, i: int, rng: Any) -> Any:
        if i == 5:
            raise ValueError("is truncated")
        return original(self, i, rng)

    monkeypatch.setattr(LabelledImages, "read", read)
    assert run(encoder, tmp_path / "strict") == 2
    said = capsys.readouterr()
    assert "samples are broken, more than run.max_broken=0.01" in said.err and "is truncated" in said.err
    assert run(encoder, tmp_path / "lax", "run.max_broken=0.1") == 0
    assert capsys.readouterr().out.count("left out, training sample") == 1
    broken = results(tmp_path / "lax")["broken"]
    assert list(broken["training"].values()) == list(broken["test"].values()) == ["is truncated"]


def test_too_many_broken_samples_end_the_run_with_what_was_learned(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Fit.step

    def stepped(self: Fit, now: Any, batches: Any) -> None:
        if now.step == 4:
            self.broken["training"].note([Broken("a.png", "is cut off"), Broken("b.png", "is cut off")])
        original(self, now, batches)

    monkeypatch.setattr(Fit, "step", stepped)
    assert run(encoder, tmp_path / "out") == 2
    assert checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000004"


def test_a_full_disk_at_the_end_is_exit_code_5(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Path.write_text

    def full(self: Path, *args: Any, **options: Any) -> int:
        if "results.json" in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert run(encoder, tmp_path / "out") == 5
    assert "results.json: No space left on device" in capsys.readouterr().err
    assert checkpoints(tmp_path / "out" / "checkpoints")[0].name == "step-00000007"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimizer.learning_rate=1",), "did you mean 'lr'?"),
        (("run.batch_size=41",), "batch_size 41 is more than the 40 images"),
        (("run.length=20%",), "is a share of what?"),
        (("run.max_broken=2",), "run.max_broken"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    words: tuple[str, ...], message: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(encoder, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_and_a_changed_recipe_are_refused(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(encoder, out) == 0
    assert run(encoder, out) == 2 and "add --resume" in capsys.readouterr().err
    assert run(encoder, out, "--resume", "optimizer.lr=2e-3") == 2
    assert "optimizer.lr: was 0.001, is 0.002" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no_such_model", "./no/such/folder"])
def test_a_wrong_encoder_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Path(name) if "/" not in name else name, tmp_path / "out") == 2  # type: ignore[arg-type]
    assert "no_such_model" in (text := capsys.readouterr().err) or "does not exist" in text


def test_torchrun_on_two_processes_equals_one(encoder: Path, tmp_path: Path) -> None:
    quiet = ("encoder.drop_path=0", "mix.mixup=0", "mix.cutmix=0", "augment.rand_augment=null", "augment.erase=0")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(ROOT / "tools" / "finetune.py"), "classification", str(encoder), "--data", "embedded:fashion_mnist"]
    words += ["--out", str(tmp_path / "two"), *SMALL, *quiet]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(encoder, tmp_path / "one", *quiet) == 0
    for one, two in zip(results(tmp_path / "one")["history"], results(tmp_path / "two")["history"], strict=True):
        assert two == {name: pytest.approx(value, rel=1e-4) for name, value in one.items()}
    assert losses(tmp_path / "two")[7]["loss"] == pytest.approx(losses(tmp_path / "one")[7]["loss"], rel=1e-4)
    single, pair = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("one", "two"))
    torch.testing.assert_close(pair, single, rtol=1e-3, atol=1e-5)


def test_two_processes_count_broken_samples_once_and_end_together(encoder: Path, tmp_path: Path) -> None:
    for split, count in (("train", 32), ("val", 20)):
        for name in "ab":
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((16, 16), 30 + 50 * (name == "a")).save(folder / f"{i}.png")
    for place in ("train/a/3.png", "train/b/3.png", "val/b/1.png"):
        (tmp_path / "data" / place).write_bytes(b"no picture")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(ROOT / "tools" / "finetune.py"), "classification", str(encoder), "--data", str(tmp_path / "data")]
    words += [word for word in SMALL if "limit" not in word] + ["run.length=60 steps", "run.evaluate_every=60 steps"]

    def launch(out: str, limit: float) -> subprocess.CompletedProcess[str]:
        more = ["--out", str(tmp_path / out), f"run.max_broken={limit}"]
        return subprocess.run([*command, *words, *more], capture_output=True, text=True, timeout=200, cwd=ROOT)

    # in 7 epochs each process meets both broken images: 4 of 64 if they were counted twice, more than 0.04
    kept = launch("kept", 0.04)
    assert kept.returncode == 0, kept.stderr[-3000:]
    broken = results(tmp_path / "kept")["broken"]
    found = {what: sorted(Path(name).name for name in names) for what, names in broken.items()}
    assert found == {"training": ["3.png", "3.png"], "test": ["1.png"]}
    ended = launch("ended", 0.026)
    assert ended.returncode != 0
    assert "2 of 64 training samples are broken, more than run.max_broken=0.026" in ended.stderr
    assert checkpoints(tmp_path / "ended" / "checkpoints") and not (tmp_path / "ended" / "results.json").exists()
