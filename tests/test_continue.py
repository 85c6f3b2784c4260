"""Continued pretraining: begins where the export is, holds the encoder first, fits other images, says what was kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from hybrid_ssl.assemble import build_groups, build_loader, build_pretrainer, lay_out
from hybrid_ssl.config import Recipe, RecipeError
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.optim import build_optimizer, set_step
from hybrid_ssl.plan import Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.train import DONE
from tests.runs import (
    assert_same_bits,
    losses,
    newest_tensors,
    pretrain,
    recipe_data,
    tiny_recipe,
    write_recipe,
)
from tests.test_train import signal_after

HOLD = {"hold_encoder": "3 steps", "warmup": "2 steps"}
PROBE = {"train_images": 200, "test_images": 100}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run; its export is what the others start from."""
    folder = tmp_path_factory.mktemp("start")
    data = {"probe": PROBE, "limit": 600}
    run = {"length": "60 steps", "batch_size": 50}
    sections = {"data": data, "run": run, "encoder": {"drop_path": 0.0}, "optimizer": {"lr": 2e-3}}
    assert pretrain(write_recipe(folder, recipe_data(folder / "run", **sections))) == DONE
    return folder / "run"


def continued(start: Path, objectives: Any = "mae+moco_v3", **sections: Any) -> dict[str, Any]:
    encoder = {"init": str(start / "encoder")} | sections.pop("encoder", {})
    optimizer = HOLD | {"lr": 1e-3} | sections.pop("optimizer", {})
    return recipe_data(sections.pop("out", "unused"), objectives, encoder=encoder, optimizer=optimizer, **sections)


def weights(pretrainer: Pretrainer, part: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pretrainer.named_parameters() if name.startswith(part)}


def parts(recipe: Recipe) -> tuple[Pretrainer, torch.optim.Optimizer, Any]:
    pretrainer = build_pretrainer(recipe, [0.3], [0.3], layout=lay_out(recipe, 1)).train()
    loader = build_loader(recipe, open_source(recipe.data), pretrainer, lay_out(recipe, 1), total_steps=10)
    return pretrainer, build_optimizer(recipe.optimizer, build_groups(recipe, pretrainer)), loader.iterate()


# the hold


@pytest.mark.parametrize("objectives", ["mae+moco_v3", "ibot"])
def test_held_encoder_and_its_teacher_stand_still_while_all_else_learns(
    objectives: str, start: Path, tmp_path: Path
) -> None:
    run = {"length": "4 steps", "checkpoint_every": "1 steps", "keep": 5}
    out = tmp_path / "run"
    assert pretrain(write_recipe(tmp_path, continued(start, objectives, out=out, run=run))) == DONE
    encoder = timm.create_model(f"local-dir:{start / 'encoder'}", pretrained=True).state_dict()
    from hybrid_ssl.checkpoint import checkpoints, load

    saved = [load(path)[0] for path in reversed(checkpoints(out / "checkpoints"))]  # after 1, 2, 3 and 4 steps
    for net in ("student", "teacher"):
        own = [{n: t for n, t in s.items() if n.startswith(f"model.{net}.model.")} for s in saved]
        for state in own[:3]:
            assert_same_bits({n.removeprefix(f"model.{net}.model."): t for n, t in state.items()}, encoder)
    token = "model.student.mask_token"
    others = [n for n in saved[0] if n.startswith("model.objectives.") and n.endswith(".weight")]
    others += [token] if token in saved[0] else []
    assert (token in others) == (objectives == "ibot")
    moved = [n for n in others if not torch.equal(saved[1][n], saved[2][n])]
    assert any(".teacher" in n for n in moved) and any("mask_token" in n for n in moved) == (objectives == "ibot")
    steps = {n: float(t) for n, t in saved[3].items() if n.startswith("optimizer.") and n.endswith(".step")}
    assert set(steps.values()) == {1.0, 4.0}  # moments of the encoder begin after the hold
    student = "model.student.model.norm.weight"
    assert torch.equal(saved[3][student], saved[2][student])  # its own warm-up begins at 0


def test_held_encoder_has_a_warm_up_of_its_own() -> None:
    recipe = tiny_recipe(optimizer=HOLD | {"schedule": "constant", "warmup": "4 steps"}, encoder={"init": "x"})
    cfg = recipe.optimizer
    pretrainer = build_pretrainer(
        recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"init": None})}),
        [0.3],
        [0.3],
        layout=lay_out(recipe, 1),
    )
    optimizer = build_optimizer(cfg, build_groups(recipe, pretrainer))
    rates: dict[bool, list[float]] = {True: [], False: []}
    for step in range(9):
        set_step(cfg, optimizer, 1.0, Progress(step, 10, 8))
        found = {"student." in group["names"][0]: group["lr"] for group in optimizer.param_groups}
        for of_encoder, rate in found.items():
            rates[of_encoder].append(rate)
    assert rates[False] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates[True][3:] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_held_passes_leave_no_graph_and_give_heads_the_same_gradients(start: Path) -> None:
    from hybrid_ssl.config import build_recipe

    recipe = build_recipe(continued(start))
    pretrainer, _, batches = parts(recipe)
    batch, now = next(batches), Progress(0, 10, 8)
    _, tokens = pretrainer.encode(batch, now)
    assert not any(both.patches.requires_grad for both in tokens.values())
    _, tokens = pretrainer.encode(batch, replace(now, step=3))
    assert any(both.patches.requires_grad for both in tokens.values())
    loss, logs = pretrainer(batch, now)
    loss.backward()
    held = {name: p.grad.clone() for name, p in pretrainer.named_parameters() if p.grad is not None}
    assert loss.item() == logs["loss"].item()
    assert all(not held[n].any() for n in weights(pretrainer, "student.model."))  # zeros, which DDP waits for
    pretrainer.zero_grad()
    pretrainer.hold_encoder = None
    pretrainer(batch, now)[0].backward()
    for name, p in pretrainer.named_parameters():
        if name.startswith("objectives.") and p.grad is not None:
            torch.testing.assert_close(p.grad, held[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stop", [1, 3, 5])  # inside the hold, at its end, in the encoder's warm-up
def test_resume_inside_and_across_the_hold_is_exact(
    stop: int, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monitor = {"log_every": 3, "probe_every": "2 steps"}
    options = {"out": whole, "run": {"length": "7 steps"}, "monitor": monitor, "data": {"probe": PROBE}}
    path = write_recipe(tmp_path, continued(start, "ibot", **options))
    assert pretrain(path) == DONE
    with monkeypatch.context() as patch:
        signal_after(patch, step=stop)
        assert pretrain(path, f"run.out={broken}") == 143
    assert pretrain(path, f"run.out={broken}", "--resume") == DONE
    assert losses(broken) == losses(whole)  # the likeness to the start as well
    assert "teacher/start_cosine" in losses(whole)[6]
    assert_same_bits(newest_tensors(broken), newest_tensors(whole))


def test_random_weights_are_not_held() -> None:
    with pytest.raises(RecipeError, match="optimizer.hold_encoder holds what the encoder knows already: set encoder"):
        tiny_recipe(optimizer=HOLD)
