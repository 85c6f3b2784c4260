"""Processes: two equal one, sharded or not; a launcher that Accelerate does not understand is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hybrid_ssl.train
from hybrid_ssl.assemble import build_groups, build_loader, build_pretrainer, lay_out
from hybrid_ssl.checkpoint import checkpoints
from hybrid_ssl.cli import main
from hybrid_ssl.config import Recipe
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.engine import StopSignal, agreed, is_sharded, read_state, write_state
from hybrid_ssl.nn.distributed import rank
from hybrid_ssl.optim import build_optimizer, clip_gradients, drop_held, set_step
from hybrid_ssl.plan import Batch, Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.schedule import value_at
from hybrid_ssl.train import Run
from tests.ranks import run_two_ranks
from tests.runs import SWIN, VIT, losses, pretrain, recipe_data, tiny_recipe, write_recipe
from tests.tiny_encoder import shared_start

ROOT = Path(__file__).parents[1]
VIEWS = {"local": {"size": 16, "crops": 2}}  # as large as the others: timm resamples positions in float32
CASES: dict[str, dict[str, Any]] = {name: {"objectives": name} for name in ("mae+moco_v3", "dino", "ibot")}
CASES["simmim on Swin"] = {
    "objectives": {"simmim": {"view": "plain", "mask": "random"}, "moco_v3": {"hidden": 32, "dim": 16}},
    "encoder": SWIN | {"drop_path": 0.2},
}


CASES["ibot, encoder held"] = {"objectives": "ibot", "optimizer": {"hold_encoder": "3 steps"}}
CASES["encoder held"] = {"objectives": "mae+moco_v3", "optimizer": {"hold_encoder": "1 steps"}}


def case(name: str) -> Recipe:
    sections: dict[str, Any] = {"views": VIEWS, "run": {"length": "5 steps"}} | CASES[name]
    if name.endswith("held"):
        start = shared_start(VIT["name"], *(f"{key}={value}" for key, value in VIT["args"].items()))
        sections["encoder"] = {"init": start, "drop_path": 0.2}
    return tiny_recipe(**sections)


def train_with_engine() -> dict[str, Any]:
    """Five steps of the engine's own loop body in float64: the whole state, by case."""
    if dist.is_initialized():  # what a launcher would have set
        place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": 2, "MASTER_ADDR": "x"}
        os.environ.update({name: str(value) for name, value in place.items()})
    found = {}
    for name in CASES:
        AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
        run = Run(case(name))
        assert run.layout.world == (dist.get_world_size() if dist.is_initialized() else 1)
        batches = run.loader.iterate()
        for step in range(5):
            run.step(Progress(step, run.total, run.steps_per_epoch), batches)
        state = {f"{key}": value.clone() for key, value in run.pretrainer.state_dict().items()}
        found[name] = state | optimizer_state(run.optimizer.optimizer.state_dict())
    return found


def optimizer_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{number}/{key}": value for number, moments in state["state"].items() for key, value in moments.items()}


def in_float64() -> dict[str, Any]:
    """`train_with_engine` with a Pretrainer in float64."""

    def build(*args: Any, **options: Any) -> Pretrainer:
        return build_pretrainer(*args, **options).double()

    original = hybrid_ssl.train.build_pretrainer
    hybrid_ssl.train.build_pretrainer = build
    try:
        return train_with_engine()
    finally:
        hybrid_ssl.train.build_pretrainer = original


def shard(pretrainer: Pretrainer) -> None:
    """As Accelerate's FSDP2 does: every block, then the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert pretrainer.teacher is not None
    for block in (*pretrainer.student.blocks(), *pretrainer.teacher.blocks()):
        fully_shard(block, mesh=mesh)
    fully_shard(pretrainer, mesh=mesh)


def sharded_parts(recipe: Recipe) -> tuple[Pretrainer, torch.optim.Optimizer, Iterator[Batch]]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = lay_out(recipe, world)
    pretrainer = build_pretrainer(recipe, [0.3], [0.3], layout=layout, rank=rank()).double()
    if world > 1:
        shard(pretrainer)
    optimizer = build_optimizer(recipe.optimizer, build_groups(recipe, pretrainer))
    loader = build_loader(recipe, open_source(recipe.data), pretrainer, layout, total_steps=5)
    return pretrainer, optimizer, loader.iterate()


def train_sharded() -> dict[str, Tensor]:
    """Three steps with `fully_shard` (with one process: without), saved and loaded into other weights after two."""
    recipe = case("encoder held")  # in the first step
    pretrainer, optimizer, batches = sharded_parts(recipe)

    def step(number: int) -> None:
        now = Progress(number, 5, 8)
        set_step(recipe.optimizer, optimizer, 1e-3, now)
        pretrainer(next(batches), now)[0].backward()
        norm = clip_gradients(recipe.optimizer.clip, [[p for p in pretrainer.parameters() if p.requires_grad]])
        drop_held(optimizer, now)
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        pretrainer.move_teachers(value_at(recipe.teacher.momentum, now))

    step(0)
    step(1)
    state = [read_state(pretrainer, optimizer)]
    if dist.is_initialized():
        dist.broadcast_object_list(state)  # the first process has it; a run reads it from the disk
        other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 1})})
        pretrainer, optimizer, _ = sharded_parts(other)
        assert is_sharded(pretrainer)
        write_state(pretrainer, optimizer, *state[0])
    step(2)
    tensors, _ = read_state(pretrainer, optimizer)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def run_sharded(recipe: str) -> int:
    """A whole run whose model is sharded where Accelerate would do it; its FSDP2 itself needs GPUs."""

    def prepare(self: Accelerator, pretrainer: Pretrainer, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        shard(pretrainer)
        now = dict(pretrainer.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[name] for name in group["names"]]
        return pretrainer, self.prepare_optimizer(optimizer)

    # only in this process, which ends soon; whoever started the process group ends it
    Accelerator.prepare, Accelerator.end_training = prepare, lambda self: None
    AcceleratorState._reset_state(reset_partial_state=False)
    return main(["pretrain", recipe, "export.every=2 steps"])


def agree() -> dict[str, Any]:
    """One process got a signal, both met broken images, one could not save."""
    accelerator = Accelerator(cpu=True)
    stop = StopSignal(accelerator)
    stop.number = int(signal.SIGTERM) if rank() == 1 else 0
    met = ["a", "b", "c"][rank() : rank() + 2]  # "b" by both
    found = {"between": stop.agreed(9, met, 3), "few": stop.agreed(10, met, 4), "many": stop.agreed(10, met, 3)}
    stop.restore()
    return found | {"saved": [agreed(accelerator, True), agreed(accelerator, rank() == 1)]}


def on_two_ranks(recipe: str) -> dict[str, Any]:
    found = {"engine": in_float64(), "sharded": train_sharded(), "agreement": agree()}
    return found | {"run": run_sharded(recipe)}


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    return write_recipe(folder, recipe_data(folder / "run", run={"length": "3 steps"}))


@pytest.fixture(scope="module")
def two_ranks(sharded_run: Path) -> list[dict[str, Any]]:
    """One start of two processes for all tests here."""
    return run_two_ranks(on_two_ranks, str(sharded_run))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return in_float64()


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_after_five_steps(
    name: str, two_ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert any("teacher" in key for key in alone[name])
    for result in two_ranks:  # parameters, teachers, centres, moments and step counts
        torch.testing.assert_close(result["engine"][name], alone[name], rtol=1e-9, atol=1e-9)


def test_processes_stop_together_and_count_broken_images_together(two_ranks: list[dict[str, Any]]) -> None:
    for result in two_ranks:  # a meeting every ten steps: each costs a wait for the device
        term = int(signal.SIGTERM)
        found = {"between": (0, 0), "few": (term, 4), "many": (term, 3), "saved": [True, False]}
        assert result["agreement"] == found


def test_sharded_training_and_its_checkpoint_equal_one_process(two_ranks: list[dict[str, Any]]) -> None:
    """FSDP2 on gloo: forward, backward, clipping, AdamW and teachers on shards, and a whole state back into shards."""
    expected = train_sharded()
    torch.testing.assert_close(two_ranks[0]["sharded"], expected, rtol=1e-9, atol=1e-11)


def test_sharded_run_hands_over_its_encoder(
    two_ranks: list[dict[str, Any]], sharded_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [result["run"] for result in two_ranks] == [0, 0]
    assert pretrain(sharded_run, f"run.out={tmp_path / 'alone'}") == 0
    found, expected = losses(sharded_run.parent / "run"), losses(tmp_path / "alone")
    assert found[1] == {name: pytest.approx(value, rel=1e-5) for name, value in expected[1].items()}
    for file in ("model.safetensors", "config.json"):
        assert (sharded_run.parent / "run" / "encoder" / file).is_file()


def test_torchrun_prints_the_losses_of_one_process_and_its_checkpoint_continues(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run = {"length": "3 steps", "checkpoint_every": "1 steps", "keep": 5}
    path = write_recipe(tmp_path, recipe_data(one, run=run))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(ROOT / "tools" / "pretrain.py"), str(path), f"run.out={two}"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "batch: 8 = 2 processes x 1 accumulated x 4" in done.stdout
    assert done.stdout.count("step 1/3") == 1  # the second process is silent
    assert pretrain(path) == 0
    first = {name: pytest.approx(value, rel=1e-5) for name, value in losses(one)[1].items()}
    assert losses(two)[1] == first

    both = losses(two)
    for newer in checkpoints(two / "checkpoints")[:-1]:
        shutil.rmtree(newer)
    assert pretrain(path, f"run.out={two}", "--resume") == 0  # by one process
    assert losses(two)[2] == {name: pytest.approx(value, rel=1e-4) for name, value in both[2].items()}
    assert losses(two).keys() == both.keys()


def test_more_processes_than_accelerate_sees_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def blind(**options: Any) -> Accelerator:  # as Accelerate is with a launcher that sets no LOCAL_RANK on GPUs
        with monkeypatch.context() as patch:
            patch.delenv("WORLD_SIZE")
            return Accelerator(**options)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hybrid_ssl.engine.Accelerator", blind)
    out = tmp_path / "run"
    assert pretrain(write_recipe(tmp_path, recipe_data(out))) == 2
    message = capsys.readouterr().err
    assert "the launcher started 2 processes, but Accelerate sees 1" in message and "torchrun" in message
    assert not out.exists()
