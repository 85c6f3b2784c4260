"""Frozen encoders: copies follow their schedule and nothing else, given weights see what they were trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from hybrid_ssl.assemble import Layout, build_groups, build_pretrainer, describe_plan, used_views
from hybrid_ssl.checkpoint import latest, load
from hybrid_ssl.config import Recipe, build_recipe
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.frozen import Frozen, FrozenSettings
from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts
from hybrid_ssl.nn.distributed import rank, world_size
from hybrid_ssl.plan import Forward, Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.reading import RecipeError
from hybrid_ssl.train import pretrain
from tests.objectives.harness import average
from tests.ranks import run_two_ranks

MEAN, STD = [0.3], [0.4]
ARGS = {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
HEADS = {"out_dim": 16, "hidden": 16, "bottleneck": 8, "local_view": None}


def recipe_of(frozen: dict[str, Any], gram: dict[str, Any] | None = None, out: str = "out", **more: Any) -> Recipe:
    """DINOv2 on small embedded images, Gram anchoring beside it."""
    raw: dict[str, Any] = {
        "run": {"length": "6 steps", "batch_size": 4, "out": out, "workers": 0, "checkpoint_every": "2 steps"},
        "encoder": {"name": "vit_tiny_patch16_224", "args": ARGS, "drop_path": 0.2},
        "data": {"source": "embedded:fashion_mnist", "limit": 16, "channels": 1, "mean": MEAN, "std": STD},
        "views": {"global": {"size": 28, "crops": 2}, "gram": {"size": 42, "crops": 2, "like": "global"}},
        "masks": {"block": {"kind": "block", "view": "global", "min_tokens": 1}},
        "objectives": {"dinov2": HEADS, "gram": gram or {}},
        "frozen": frozen,
        "teacher": {"momentum": 0.5},
        "optimizer": {"lr": 1e-3, "lr_per": None, "weight_decay": 0.04},
        "monitor": {"probe_every": None, "log_every": 2, "k": 5},
        "export": {"verify": False},
    }
    return build_recipe(raw | more)


def assemble(recipe: Recipe, world: int = 1, place: int = 0) -> Pretrainer:
    layout = Layout(world, recipe.run.batch_size // world, 1)
    return build_pretrainer(recipe, MEAN, STD, layout=layout, rank=place)


def batches(recipe: Recipe, pretrainer: Pretrainer, world: int = 1, place: int = 0) -> Any:
    views, masks = used_views(recipe, pretrainer)
    return Loader(
        open_source(recipe.data),
        recipe.data,
        {name: recipe.views[name] for name in views},
        {name: recipe.masks[name] for name in masks},
        grids=pretrainer.spec.grids,
        stride=pretrainer.spec.stride,
        batch_size=recipe.run.batch_size,
        micro_batch=recipe.run.batch_size // world,
        world=world,
        rank=place,
        total_steps=6,
    ).iterate()


def save(model: nn.Module, folder: Path, side: int) -> None:
    card = CardFacts(title="an encoder")
    export_encoder(model, folder, input_size=(1, side, side), mean=[0.5], std=[0.2], card=card, verify=False)


def weights_of(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"after": "3 steps"}, [3]),
        ({"after": "3 steps", "every": "4 steps"}, [3, 7, 11, 15, 19]),
        ({"after": "3 steps", "every": "4 steps", "max_updates": 2}, [3, 7, 11]),
        ({"after": "50%", "every": "1 epochs", "max_updates": 1}, [10, 15]),
        ({}, [0]),
    ],
    ids=str,
)
def test_copies_are_taken_when_the_schedule_says(settings: dict[str, Any], steps: list[int]) -> None:
    cfg = FrozenSettings(of="teacher", **settings)
    frozen = Frozen(assemble(recipe_of({"gram": {"of": "student"}})).student, cfg, MEAN, STD)
    assert [step for step in range(20) if frozen.due(Progress(step, 20, 5))] == steps


def test_a_copy_is_the_teacher_of_that_step_and_stays_until_the_next() -> None:
    pretrainer = assemble(recipe_of({"gram": {"of": "teacher", "after": "2 steps", "every": "2 steps"}}))
    assert pretrainer.teacher is not None
    frozen, teacher = pretrainer.encoder("gram").model, pretrainer.teacher.model
    start, seen = weights_of(frozen), {}
    assert same(start, weights_of(teacher))
    for step in range(1, 6):  # before each step
        with torch.no_grad():
            for parameter in pretrainer.student.parameters():
                parameter += 0.1
        pretrainer.move_teachers(0.5)
        pretrainer.refresh_frozen(Progress(step, 6, 4))
        seen[step] = (weights_of(frozen), weights_of(teacher))
    assert same(seen[1][0], start) and not same(seen[1][1], start)
    assert same(seen[2][0], seen[2][1]) and same(seen[3][0], seen[2][1]) and not same(seen[3][1], seen[2][1])
    assert same(seen[4][0], seen[4][1]) and same(seen[5][0], seen[4][1])


def test_a_copy_of_the_student_at_the_start_is_an_anchor() -> None:
    pretrainer = assemble(recipe_of({"gram": {"of": "student"}}))
    start = weights_of(pretrainer.student.model)
    with torch.no_grad():
        for parameter in pretrainer.student.parameters():
            parameter += 1
    for step in range(1, 6):
        pretrainer.refresh_frozen(Progress(step, 6, 4))
    assert same(weights_of(pretrainer.encoder("gram").model), start)


def test_a_frozen_encoder_is_in_the_state_and_has_no_gradient_nor_noise() -> None:
    recipe = recipe_of({"gram": {"of": "teacher", "after": "1 steps"}})
    pretrainer = assemble(recipe).train()
    assert not any(module.training for module in pretrainer.frozen["gram"].modules())
    assert pretrainer.encoder("gram").mask_token is None
    loss, logs = pretrainer(next(batches(recipe, pretrainer)), Progress(0, 6, 4))
    loss.backward()
    assert logs["gram/loss"] > 0
    assert all(p.grad is None and not p.requires_grad for p in pretrainer.frozen.parameters())
    assert not [name for name, p in pretrainer.named_parameters() if p.requires_grad and p.grad is None]
    kept = {name for name in pretrainer.state_dict() if name.startswith("frozen.")}
    assert kept == {f"frozen.gram.encoder.model.{name}" for name in pretrainer.student.model.state_dict()}
    names = [name for group in build_groups(recipe, pretrainer) for name in group["names"]]
    assert not [name for name in names if name.startswith("frozen")]


def test_without_weight_the_frozen_pass_is_not_run() -> None:
    weight = {"start": 0.0, "end": 2.0, "after": "2 steps", "over": "2 steps"}
    recipe = recipe_of({"gram": {"of": "teacher"}}, {"weight": weight})
    pretrainer = assemble(recipe).train()
    batch, frozen = next(batches(recipe, pretrainer)), pretrainer.frozen["gram"]
    calls: list[int] = []
    frozen.register_forward_hook(lambda *_: calls.append(step))
    for step in range(5):
        pretrainer.zero_grad()
        loss, logs = pretrainer(batch, Progress(step, 6, 4))
        loss.backward()
        assert not [name for name, p in pretrainer.named_parameters() if p.requires_grad and p.grad is None]
        assert (logs["gram/loss"] > 0) == (step > 2)
        torch.testing.assert_close(loss.detach(), logs["dinov2/loss"] + max(0, step - 2) * logs["gram/loss"])
    assert calls == [3, 4]


def test_weight_before_the_copy_is_refused(tmp_path: Path) -> None:
    frozen = {"gram": {"of": "teacher", "after": "50%"}}
    late = {"start": 0.0, "end": 2.0, "after": "50%", "over": "1 steps"}
    assemble(recipe_of(frozen, {"weight": late})).check_schedule(6, 4)
    assemble(recipe_of({"gram": {"of": "student"}})).check_schedule(6, 4)
    for weight in (1.0, late | {"after": "1 steps"}):
        pretrainer = assemble(recipe_of(frozen, {"weight": weight}))
        with pytest.raises(ValueError, match="before frozen.gram is copied at step 3.*set objectives.gram.weight="):
            pretrainer.check_schedule(6, 4)
    with pytest.raises(ValueError, match="before frozen.gram is copied"):
        pretrain(recipe_of(frozen, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_larger_picture_of_another_view_leaves_the_encoders_size() -> None:
    recipe = recipe_of({"gram": {"of": "teacher"}})
    pretrainer = assemble(recipe)
    assert recipe.native_size == (28, 28) and pretrainer.student.model.patch_embed.img_size == (28, 28)
    assert (pretrainer.spec.grids["gram"], pretrainer.spec.frozen["gram"].grids["gram"]) == ((6, 6), (6, 6))
    lines = describe_plan(pretrainer)
    assert any("gram gram" in line and "2 x 36 tokens" in line for line in lines)


def test_given_weights_see_images_as_they_were_trained_with(tmp_path: Path) -> None:
    """Another width, patch size and normalisation."""
    args = {"patch_size": 14, "embed_dim": 36, "depth": 1, "num_heads": 3, "img_size": 42, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **args).eval()
    save(model, tmp_path / "large", 42)
    recipe = recipe_of({"large": {"weights": str(tmp_path / "large")}}, {"encoder": "large"})
    pretrainer = assemble(recipe)
    spec = pretrainer.spec.frozen["large"]
    assert (spec.dim, spec.grids["gram"], spec.grids["global"]) == (36, (3, 3), (2, 2))
    batch = next(batches(recipe, pretrainer))
    _, tokens = pretrainer.encode(batch, Progress(0, 6, 4))
    images = (batch.views["gram"] / 255 - 0.5) / 0.2
    own = pretrainer.encoder("large").model
    expected = own.forward_features(images)[:, 1:].detach()
    torch.testing.assert_close(tokens[Forward("large", "gram")].patches, expected, rtol=1e-4, atol=1e-5)
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in own.state_dict().items() if name != "pos_embed")
    before = weights_of(own)
    pretrainer.refresh_frozen(Progress(0, 6, 4))
    assert same(weights_of(own), before)


def test_given_weights_change_no_initial_weight_of_the_run(tmp_path: Path) -> None:
    alone = assemble(recipe_of({"gram": {"of": "student"}}))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=28, in_chans=1, **ARGS)
    save(model, tmp_path / "large", 28)
    beside = assemble(recipe_of({"gram": {"weights": str(tmp_path / "large")}}))
    assert same(weights_of(alone.objectives), weights_of(beside.objectives))
    assert same(weights_of(alone.student), weights_of(beside.student))


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ({"gram": {}}, "a copy `of` the teacher or student, or has given `weights`: set one"),
        ({"gram": {"of": "teacher", "weights": "x"}}, "set one"),
        ({"gram": {"weights": "x", "after": "3 steps"}}, "given weights stay as they are"),
        ({"gram": {"of": "teacher", "max_updates": 3}}, "max_updates needs `every`"),
        ({"teacher": {"of": "student"}}, "'teacher' cannot name a frozen encoder"),
        ({"gram": {"of": "teachr"}}, "frozen.gram.of"),
    ],
    ids=str,
)
def test_wrong_sections_are_named(frozen: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(frozen)


def test_what_does_not_fit_the_objectives_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objectives.gram: there is no frozen encoder 'gram'.*has: none"):
        assemble(recipe_of({}))
    with pytest.raises(ValueError, match="frozen.other is used by no objective"):
        assemble(recipe_of({"gram": {"of": "teacher"}, "other": {"of": "teacher"}}))
    only = {"gram": {"view": "global", "mask": "block"}}
    with pytest.raises(ValueError, match="frozen.gram copies the teacher, but no objective has one: set of: student"):
        assemble(recipe_of({"gram": {"of": "teacher"}}, objectives=only))
    with pytest.raises(ValueError, match="frozen.gram: encoder 'vit_tinny"):
        assemble(recipe_of({"gram": {"weights": "vit_tinny_patch16_224"}}))


def steps_on(frozen: dict[str, Any]) -> dict[str, Any]:
    """Three float64 steps with averaged gradients, as DDP takes them; the noise and the data know their place."""
    recipe = recipe_of(frozen)
    pretrainer = assemble(recipe, world_size(), rank()).double().train()
    stream, losses = batches(recipe, pretrainer, world_size(), rank()), []
    for step in range(3):
        pretrainer.zero_grad()
        loss, _ = pretrainer(next(stream), Progress(step, 6, 4))
        loss.backward()
        losses.append(average(loss.detach()))
        with torch.no_grad():
            for parameter in pretrainer.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * average(parameter.grad)
        pretrainer.move_teachers(0.5)
        pretrainer.refresh_frozen(Progress(step + 1, 6, 4))
    return {"losses": losses, "frozen": weights_of(pretrainer.frozen)}


def test_two_ranks_equal_one() -> None:
    frozen = {"gram": {"of": "teacher", "after": "1 steps", "every": "1 steps"}}
    alone = steps_on(frozen)
    for result in run_two_ranks(steps_on, frozen):
        torch.testing.assert_close(result, alone, rtol=1e-9, atol=1e-11)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    frozen = {"gram": {"of": "teacher", "after": "3 steps", "every": "2 steps", "max_updates": 1}}
    gram = {"weight": {"start": 0.0, "end": 2.0, "after": "2 steps", "over": "1 steps"}}

    def finish(resume: bool) -> dict[str, Tensor]:
        assert pretrain(recipe_of(frozen, gram, out=str(tmp_path / "run")), resume=resume) == 0
        found = latest(tmp_path / "run" / "checkpoints")
        assert found is not None and found.name.endswith("6")
        return load(found)[0]

    whole = finish(resume=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")  # as if it had been killed after step 4
    again = finish(resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    names = [name for name in whole if name.startswith("model.frozen.gram")]
    assert names
    teacher = [whole[name.replace("frozen.gram.encoder", "teacher")] for name in names]
    assert not same([whole[name] for name in names], teacher)  # step 5's copy is not step 6's teacher
