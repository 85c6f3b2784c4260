"""Continued pretraining: begins where the export is, holds the encoder first, fits other images, says what was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from hybrid_ssl.assemble import build_groups, build_loader, build_pretrainer, lay_out
from hybrid_ssl.checkpoint import checkpoints, load
from hybrid_ssl.config import Recipe, RecipeError, build_recipe
from hybrid_ssl.data.labelled import open_probe, read_images
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.encoder import build_encoder
from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts
from hybrid_ssl.monitor.knn import knn_accuracy
from hybrid_ssl.optim import build_optimizer, set_step
from hybrid_ssl.plan import Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.settings import EncoderSettings
from hybrid_ssl.train import DONE
from tests.runs import (
    MAE_ENTRY,
    SWIN,
    VIT,
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
ENCODER = {"args": VIT["args"] | {"class_token": False, "global_pool": "avg", "fc_norm": False}, "drop_path": 0.0}
VIEWS = {  # as the quickstart's: what such a small encoder learns something from
    "plain": {"size": 16, "scale": [0.6, 1.0], "hflip": 0.0},
    "global": {"size": 16, "crops": 2, "scale": [0.65, 1.0], "hflip": 0.0, "jitter": {"saturation": 0.0, "hue": 0.0}},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run; its export is what the others start from."""
    folder = tmp_path_factory.mktemp("start")
    data = {"probe": PROBE, "limit": 600}
    run = {"length": "60 steps", "batch_size": 50}
    sections = {"data": data, "run": run, "encoder": ENCODER, "views": VIEWS, "optimizer": {"lr": 2e-3}}
    assert pretrain(write_recipe(folder, recipe_data(folder / "run", **sections))) == DONE
    return folder / "run"


def continued(start: Path, objectives: Any = "mae+moco_v3", **sections: Any) -> dict[str, Any]:
    encoder = ENCODER | {"init": str(start / "encoder")} | sections.pop("encoder", {})
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


# where it starts, and what it keeps


def test_run_starts_at_the_k_nn_of_the_export_and_does_not_fall_below(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe = {"train_images": 500, "test_images": 500}
    run = {"length": "120 steps", "batch_size": 50}
    data = {"probe": probe, "limit": 600}
    monitor = {"log_every": 40, "probe_every": "60 steps"}
    raw = continued(start, out=tmp_path / "run", run=run, data=data, monitor=monitor, views=VIEWS)
    raw["optimizer"] |= {"hold_encoder": "10%", "warmup": "10%"}
    assert pretrain(write_recipe(tmp_path, raw)) == DONE

    recipe = build_recipe(raw)
    sources, size = open_probe(recipe.data, open_source(recipe.data)), (16, 16)
    train, test = (read_images(source, 500, size, recipe.data) for source in sources)
    encoder = timm.create_model(f"local-dir:{start / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        batches = [[(part / 255 - 0.3) / 0.3 for part in found.images.split(128)] for found in (train, test)]
        features = [torch.cat([encoder(batch) for batch in each]) for each in batches]
    assert train.labels is not None and test.labels is not None
    exported = knn_accuracy(features[0], train.labels, features[1], test.labels, 20, 0.07)
    rows = losses(tmp_path / "run")
    assert rows[0]["student/knn"] == pytest.approx(exported, abs=1e-6)
    assert rows[120]["teacher/knn"] >= exported
    said = capsys.readouterr().out
    assert f"k-NN {exported:.3f} at the start -> {rows[120]['teacher/knn']:.3f} now; features keep " in said


def test_likeness_to_the_start_is_logged_and_on_the_card(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, monitor = {"length": "8 steps"}, {"log_every": 1, "probe_every": "4 steps"}
    data = {"limit": 64}
    optimizer = {"lr": 0.02, "hold_encoder": "4 steps", "warmup": "0 steps", "schedule": "constant"}
    out = tmp_path / "run"
    raw = continued(start, out=out, run=run, monitor=monitor, data=data, optimizer=optimizer)
    assert pretrain(write_recipe(tmp_path, raw)) == DONE
    rows, said = losses(out), capsys.readouterr().out
    for step in (0, 4):  # the end of the hold: not a bit of the encoder has moved
        assert rows[step]["student/start_cosine"] == pytest.approx(1) == rows[step]["student/start_cka"]
    last = rows[8]
    assert 0 < last["teacher/start_cosine"] < 1 and last["student/start_cosine"] < 0.999
    sentence = f"features keep {last['teacher/start_cosine']:.3f} cosine similarity to the start (linear CKA "
    assert sentence in said and "the encoder is held for 4 steps: heads, decoder and mask token learn first" in said
    card = (out / "encoder" / "README.md").read_text()
    assert f"cosine {last['teacher/start_cosine']:.4f}, linear CKA {last['teacher/start_cka']:.4f}" in card
    summary = json.loads((out / "encoder" / "config.json").read_text())["ssl"]
    assert summary["likeness_to_start"]["cosine"] == pytest.approx(last["teacher/start_cosine"])


def test_runs_from_random_weights_say_nothing_of_a_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = recipe_data(tmp_path / "run", {"mae": MAE_ENTRY}, run={"length": "1 steps"})
    assert pretrain(write_recipe(tmp_path, raw)) == DONE
    assert "the start" not in capsys.readouterr().out
    assert not any("start" in name for row in losses(tmp_path / "run").values() for name in row)


def test_other_mean_and_std_than_the_weights_know_are_noted(start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(start, continued(start, out=start / "other", data={"mean": [0.5]}))
    assert pretrain(path, "--dry-run") == DONE
    assert "these weights know images with mean [0.3] and std [0.3], this run makes it [0.5]" in capsys.readouterr().out


# layer decay


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_layer_decay_reaches_the_optimizer_of_a_loaded_encoder(kind: str, tmp_path: Path) -> None:
    cfg = EncoderSettings.model_validate(VIT if kind == "vit" else SWIN)
    model = build_encoder(cfg, in_chans=1, sizes={"plain": (16, 16)}).model
    facts: dict[str, Any] = {"mean": [0.3], "std": [0.3], "card": CardFacts()}
    export_encoder(model, tmp_path / "encoder", input_size=(1, 16, 16), verify=False, **facts)
    encoder = {"name": cfg.name, "args": {}, "init": str(tmp_path / "encoder")}
    objectives = {"simmim": {"view": "plain", "mask": "random"}}
    raw = recipe_data("unused", objectives, encoder=encoder, optimizer=HOLD | {"layer_decay": 0.5})
    pretrainer, optimizer, _ = parts(build_recipe(raw))
    scale = {name: g["lr_scale"] for g in optimizer.param_groups for name in g["names"]}
    block = "blocks.{}" if kind == "vit" else "layers.{}.blocks.0"
    wanted = {"norm.weight": 1.0, f"{block.format(1)}.mlp.fc1.weight": 0.5, f"{block.format(0)}.attn.qkv.weight": 0.25}
    wanted["patch_embed.proj.weight"] = 0.125
    assert {name: scale[f"student.model.{name}"] for name in wanted} == wanted
    assert all(value == 1.0 for name, value in scale.items() if name.startswith("objectives."))
    assert scale["student.mask_token"] == 0.125  # as the stem, whose output it replaces
    holds = {name: g["hold"] for g in optimizer.param_groups for name in g["names"]}
    assert {name for name, hold in holds.items() if hold} == {n for n in holds if n.startswith("student.model.")}


# other images


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels_and_another_size_continue_and_leave_as_they_are(channels: int, tmp_path: Path) -> None:
    model = build_encoder(EncoderSettings.model_validate(VIT), in_chans=3, sizes={"plain": (16, 16)}).model
    facts: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.2] * 3, "card": CardFacts()}
    export_encoder(model, tmp_path / "rgb", input_size=(3, 16, 16), verify=False, **facts)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 24, channels), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        np.save(tmp_path / "images" / f"{i}.npy", image[..., 0] if channels == 1 else image)
    data = {"source": str(tmp_path / "images"), "channels": channels, "mean": "auto", "std": "auto", "limit": None}
    run = {"length": "2 steps", "checkpoint_every": "1 steps"}
    objectives = {"mae": MAE_ENTRY}
    encoder = {"init": str(tmp_path / "rgb"), "drop_path": 0.0}
    options = {"encoder": encoder, "views": {"plain": {"size": 24}}, "data": data, "run": run}
    raw = recipe_data(tmp_path / "run", objectives, optimizer={"hold_encoder": "1 steps"}, **options)
    raw["views"] = {"plain": raw["views"]["plain"]}
    raw["masks"] = {"random": raw["masks"]["random"]}
    assert pretrain(write_recipe(tmp_path, raw)) == DONE

    held = load(checkpoints(tmp_path / "run" / "checkpoints")[-1])[0]  # after one step: as it was loaded
    stem, rgb = held["model.student.model.patch_embed.proj.weight"], model.patch_embed.proj.weight.detach()
    assert stem.shape[1] == channels and held["model.student.model.pos_embed"].shape[1] == 1 + 6 * 6
    if channels == 1:  # a gray image is seen as its three equal channels were
        torch.testing.assert_close(stem, rgb.sum(1, keepdim=True))
    else:  # R, G, B, R, ... and as loud all together
        for channel in range(channels):
            torch.testing.assert_close(stem[:, channel], rgb[:, channel % 3] * 3 / channels)
    for name in ("blocks.1.mlp.fc1.weight", "norm.weight", "cls_token"):
        assert torch.equal(held[f"model.student.model.{name}"], model.state_dict()[name])

    left = timm.create_model(f"local-dir:{tmp_path / 'run' / 'encoder'}", pretrained=True).eval()
    newest = newest_tensors(tmp_path / "run")
    assert_same_bits(left.state_dict(), {name: newest[f"model.student.model.{name}"] for name in left.state_dict()})
    assert tuple(left.pretrained_cfg["input_size"]) == (channels, 24, 24)
    assert left(torch.zeros(2, channels, 24, 24)).shape == (2, 32)
