"""Checkpoints come back bit for bit, survive being killed while they are written, and never load when damaged."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hybrid_ssl import checkpoint, storage


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.weight": torch.randn(7, 5, generator=generator),
        "model.bias": torch.full((3,), float(step)),
        "model.count": torch.tensor(step),
        "model.empty": torch.zeros(0, 4),
        "optimizer.state.0.exp_avg": torch.randn(7, 5, generator=generator).bfloat16(),
        "optimizer.mask": torch.tensor([True, False]),
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    state = {"step": 3, "lr": 0.1 + 0.2, "nested": {"list": [1, None, "é", True]}}
    path = checkpoint.save(tmp_path, 3, tensors(3), state, keep=2)
    assert path == tmp_path / "step-00000003"
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    found, found_state = checkpoint.load(path)
    assert equal(found, tensors(3)) and found_state == state


def test_shared_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    given = {"m.all": base, "m.tied": base, "m.row": base[1], "m.transposed": base.t(), "n.step": base[::2, ::3]}
    found, _ = checkpoint.load(checkpoint.save(tmp_path, 1, given, {}, keep=2))
    assert equal(found, given)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95)),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), fused=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    ],
    ids=["adamw", "amsgrad", "fused", "sgd"],
)
def test_optimizer_state_comes_back_bit_equal(tmp_path: Path, make: object) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        groups = [{"params": list(model[0].parameters()), "lr_scale": 0.5}, {"params": list(model[1].parameters())}]
        return model, make(groups)  # type: ignore[operator]

    model, optimizer = build()
    train(model, optimizer, range(3))
    flat, tree = checkpoint.flatten(optimizer.state_dict(), "optimizer")
    flat |= {f"model.{k}": v for k, v in model.state_dict().items()}
    path = checkpoint.save(tmp_path, 3, flat, {"optimizer": tree}, keep=2)
    train(model, optimizer, range(3, 6))

    other, other_optimizer = build()
    found, state = checkpoint.load(path)
    other.load_state_dict({k.removeprefix("model."): v for k, v in found.items() if k.startswith("model.")})
    other_optimizer.load_state_dict(checkpoint.unflatten(found, state["optimizer"]))
    train(other, other_optimizer, range(3, 6))
    assert equal(model.state_dict(), other.state_dict())
    a, b = checkpoint.flatten(optimizer.state_dict(), "o"), checkpoint.flatten(other_optimizer.state_dict(), "o")
    assert equal(a[0], b[0]) and a[1] == b[1]


def test_gradient_scaler_state_is_json() -> None:
    given = torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict()
    flat, tree = checkpoint.flatten(given, "scaler")
    assert not flat and checkpoint.unflatten({}, json.loads(json.dumps(tree))) == given


def test_flatten_names_what_it_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"run\.rng\.1 is a set"):
        checkpoint.flatten({"rng": [1, {2}]}, "run")


def test_newest_are_kept_and_at_least_two(tmp_path: Path) -> None:
    for step in (1, 2, 3, 100_000_000):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-100000000", "step-00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-100000000"]
    with pytest.raises(ValueError, match="at least two"):
        checkpoint.save(tmp_path, 4, tensors(4), {}, keep=1)


def test_empty_folder_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "missing") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "add"])
def test_damaged_newest_falls_back_and_says_why(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = (checkpoint.save(tmp_path, s, tensors(s), {"step": s}, keep=2) for s in (1, 2))
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "delete":
        file.unlink()
    else:
        (newest / "extra.safetensors").write_bytes(content)
    assert checkpoint.latest(tmp_path) == older
    assert "step-00000002 is skipped" in caplog.text
    with pytest.raises(checkpoint.CheckpointError, match="cannot be loaded"):
        checkpoint.load(newest)
    (older / "state.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="none of the 2 checkpoints"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_state_is_refused(tmp_path: Path, value: float) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), {}, keep=2)
    bad = tensors(2) | {"model.bias": torch.tensor([1.0, value])}
    with pytest.raises(checkpoint.NonFiniteError, match=r"model\.bias"):
        checkpoint.save(tmp_path, 2, bad, {}, keep=2)
    with pytest.raises(checkpoint.NonFiniteError, match="state"):
        checkpoint.save(tmp_path, 2, tensors(2), {"loss": value}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_every_disk_error_leaves_the_previous_checkpoint(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), {"step": 1}, keep=2)
    real = getattr(os, call)
    calls: list[bool] = []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(len(calls) == at)
        if calls[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    failures = 0
    for at in range(20):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                checkpoint.save(tmp_path, 2, tensors(2), {"step": 2}, keep=2)
            except storage.StorageError as error:
                failures += 1
                assert "No space left" in str(error)
        newest = checkpoint.latest(tmp_path)
        assert newest is not None and checkpoint.load(newest)[1]["step"] in (1, 2)
        assert not list(tmp_path.glob(".*"))
        if len(calls) <= at:
            break
    assert failures >= 1 and not any(calls)


def test_full_disk_leaves_no_partial(tmp_path: Path) -> None:
    """A real short write: the process may not make files larger than 20 kB."""
    program = """
import resource, signal, sys, torch
from pathlib import Path
from hybrid_ssl import checkpoint, storage
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"model.w": torch.ones(10)}, {}, keep=2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(folder, 2, {"model.w": torch.ones(100_000)}, {}, keep=2)
except storage.StorageError as error:
    print("refused:", error)
print(sorted(p.name for p in folder.iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120)
    assert "refused: cannot write" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "['step-00000001']"


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(storage.StorageError, match="MB are needed"):
        checkpoint.save(tmp_path, 1, tensors(1), {}, keep=2)
    assert not list(tmp_path.iterdir())


SAVER = """
import sys, torch
from pathlib import Path
from hybrid_ssl import checkpoint, storage
torch.set_num_threads(1)
folder = Path(sys.argv[1])
with storage.lock(folder):
    storage.sweep(folder)
    newest = checkpoint.latest(folder)
    step = 0 if newest is None else checkpoint.load(newest)[1]["step"]
    print("started", flush=True)
    while True:
        step += 1
        value = torch.full((200_000,), float(step))
        checkpoint.save(folder, step, {"model.w": value, "optimizer.m": value}, {"step": step}, keep=2)
"""


def test_kill_while_saving_leaves_a_loadable_latest_of_one_step(tmp_path: Path) -> None:
    draw = random.Random(0)
    last = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        time.sleep(draw.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        newest = checkpoint.latest(tmp_path)
        if newest is None:
            continue
        found, state = checkpoint.load(newest)
        assert state["step"] >= last
        last = state["step"]
        assert all(bool((t == last).all()) for t in found.values())
    assert last > 0
    with storage.lock(tmp_path):  # the killed holder's lock is free
        storage.sweep(tmp_path)
    assert not [p.name for p in tmp_path.iterdir() if p.name[:5] in (".tmp-", ".del-", ".old-")]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom hybrid_ssl import storage\n"
        "with storage.lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f'"pid": {process.pid}'), storage.lock(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with (
        storage.lock(tmp_path),
        pytest.raises(ValueError, match="this very process"),
        storage.lock(tmp_path),
    ):
        pass
    with storage.lock(tmp_path):
        pass


def test_sweep_puts_a_replaced_folder_back(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement: the old one must return."""
    mark = "0123456789abcdef" * 2
    names = [".old-export-{}", ".old-step-00000001-{}", ".tmp-x-{}", ".del-step-00000001-{}", "step-00000001"]
    for name in (*(name.format(mark) for name in names), ".tmp-of-the-user"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    (tmp_path / ".lock").write_text("")
    assert len(storage.sweep(tmp_path)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", ".tmp-of-the-user", "export", "step-00000001"]
    assert (tmp_path / "export" / "name").read_text() == names[0].format(mark)
    assert (tmp_path / "step-00000001" / "name").read_text() == "step-00000001"


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\): choose another"):
        with storage.lock(tmp_path / "file" / "run"):
            pass
