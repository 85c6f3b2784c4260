"""Distillation: independent numbers, other widths and grids, anchors, and what does not fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from hybrid_ssl.assemble import Layout, build_pretrainer, describe_plan, used_views
from hybrid_ssl.checkpoint import latest, load
from hybrid_ssl.config import Recipe, build_recipe
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.nn.gram import resize_patches
from hybrid_ssl.nn.standardise import RunningStandardise
from hybrid_ssl.objectives.distil import match
from hybrid_ssl.plan import Batch, EncoderSpec, Forward, Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.reading import RecipeError
from hybrid_ssl.train import pretrain
from tests.objectives import harness
from tests.tiny_encoder import write_encoder

LARGE = {"teacher": "gram", "view": "global"}  # the harness's frozen encoder, of another width
CASES: dict[str, dict[str, Any]] = {
    "mlp": LARGE | {"hidden": 16},
    "linear": LARGE | {"head": "linear", "targets": "standardised", "pooled_cosine": 0.5, "patches": 2.0},
    "pooled": LARGE | {"hidden": 16, "patches": 0.0},
    "patches": LARGE | {"hidden": 16, "pooled": 0.0, "mask": "block"},
}
SAME = EncoderSpec(dim=32, stride=8, grids={"global": (4, 4)}, crops={"global": 2})
ANCHOR = LARGE | {"head": "none", "mask": "block", "patch_cosine": 0.5}
STRIDES = replace(  # a Swin's 7 x 6 units, a ViT's 14 x 12 patches
    SAME, stride=32, family="swin", grids={"global": (7, 6)}, frozen={"gram": replace(SAME, grids={"global": (14, 12)})}
)


def numbers(predicted: np.ndarray, target: np.ndarray, share: float) -> float:
    """The loss by loops over rows and values."""
    losses = []
    for x, t in zip(predicted.reshape(-1, len(predicted[0].T)), target.reshape(-1, len(target[0].T)), strict=True):
        cosine = sum(a * b for a, b in zip(x, t, strict=True)) / np.sqrt((x**2).sum() * (t**2).sum())
        gaps = [abs(a - b) for a, b in zip(x, t, strict=True)]
        smooth = [gap - 0.5 if gap > 1 else 0.5 * gap**2 for gap in gaps]
        losses.append(share * (1 - cosine) + (1 - share) * sum(smooth) / len(smooth))
    return float(np.mean(losses))


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_loss_equals_a_loop_over_rows_and_values(share: float) -> None:
    draw = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(12, 5, generator=draw, dtype=torch.float64) * 2 for _ in range(2))
    found, cosine = match(predicted, target, share)
    assert float(found) == pytest.approx(numbers(predicted.numpy(), target.numpy(), share), rel=1e-12)
    assert float(cosine) == pytest.approx(1 - numbers(predicted.numpy(), target.numpy(), 1.0), rel=1e-12)


def test_objective_equals_numpy_with_its_heads() -> None:
    """Pooled with cosine alone, patches with both, each with its weight."""
    spec = replace(
        STRIDES, frozen={"gram": EncoderSpec(dim=20, stride=8, grids={"global": (7, 6)}, crops={"global": 2})}
    )
    objective = harness.build("distil", LARGE | {"head": "linear", "pooled": 3.0, "patches": 0.5}, spec)
    tokens, batch = harness.make_inputs(objective.needs, spec=spec)
    student, teacher = tokens[Forward("student", "global")], tokens[Forward("gram", "global")]
    weights = {name: value.numpy() for name, value in objective.state_dict().items()}

    def head(name: str, x: Tensor) -> np.ndarray:
        return x.detach().numpy() @ weights[f"heads.{name}.0.weight"].T + weights[f"heads.{name}.0.bias"]

    pooled = numbers(head("pooled", student.cls), teacher.cls.numpy(), 1.0)
    patches = numbers(head("patches", student.patches).reshape(-1, 20), teacher.patches.reshape(-1, 20).numpy(), 0.9)
    with torch.no_grad():
        found = objective.loss(tokens, batch, harness.now())
    assert float(found["loss"]) == pytest.approx(3.0 * pooled + 0.5 * patches, rel=1e-12)
    assert float(found["pooled"]) == pytest.approx(pooled) and float(found["patches"]) == pytest.approx(patches)


def test_a_perfect_student_has_no_loss() -> None:
    spec = replace(SAME, frozen={"gram": SAME})
    objective = harness.build("distil", ANCHOR, spec)
    assert not list(objective.parameters())
    tokens, batch = harness.make_inputs(objective.needs, spec=spec)
    there = dict.fromkeys(objective.needs, tokens[objective.needs[1]])
    found = objective.loss(there, batch, harness.now())
    assert float(found["loss"]) == pytest.approx(0, abs=1e-12) and float(found["patches_cosine"]) == pytest.approx(1)
    assert objective.loss(tokens, batch, harness.now())["loss"] > 0.5


def test_an_anchor_with_smooth_l1_keeps_lengths_as_well() -> None:
    target = harness.make_inputs([Forward("gram", "global")])[0][Forward("gram", "global")].cls
    assert float(match(3 * target, target, 1.0)[0]) == pytest.approx(0, abs=1e-12)
    assert float(match(3 * target, target, 0.5)[0]) > 0.1


def test_other_strides_meet_on_the_students_grid() -> None:
    objective = harness.build("distil", LARGE | {"head": "none", "pooled": 0.0}, STRIDES)
    tokens, batch = harness.make_inputs(objective.needs, spec=STRIDES)
    ramp = torch.arange(12.0, dtype=torch.float64).expand(14, 12).reshape(1, 168, 1).expand(8, -1, 32)
    tokens[objective.needs[1]] = tokens[objective.needs[1]]._replace(patches=ramp.clone())
    small = torch.arange(6.0, dtype=torch.float64) * 2 + 0.5  # of two columns; less at the borders
    resized = resize_patches(ramp, (14, 12), (7, 6), smooth=True).unflatten(1, (7, 6))
    torch.testing.assert_close(resized[0, :, 1:-1, 0], small[1:-1].expand(7, -1))
    tokens[objective.needs[0]] = tokens[objective.needs[0]]._replace(patches=resized.flatten(1, 2))
    assert float(objective.loss(tokens, batch, harness.now())["loss"]) == pytest.approx(0, abs=1e-12)
    harness.check_gradients("distil", LARGE | {"hidden": 8}, STRIDES)


def test_the_teacher_may_look_at_a_larger_picture_of_the_crops() -> None:
    larger = EncoderSpec(dim=20, stride=8, grids={"large": (8, 8)}, crops={"large": 2})
    spec = replace(SAME, frozen={"gram": larger}, crops={"global": 2, "large": 2})
    spec = replace(spec, grids={"global": (4, 4), "large": (8, 8)}, made={"large": frozenset({"like=global"})})
    settings = LARGE | {"teacher_view": "large", "hidden": 8}
    objective = harness.build("distil", settings, spec)
    assert objective.needs == (Forward("student", "global"), Forward("gram", "large"))
    harness.check_gradients("distil", settings, spec)
    with pytest.raises(ValueError, match="view 'large' has to be made with like=global: set views.large.like=global"):
        harness.build("distil", settings, replace(spec, made={"large": frozenset()}))


def test_a_coarser_grid_leaves_out_no_patch_and_adds_no_overshoot() -> None:
    one = torch.zeros(1, 64, 1)
    for patch in range(64):
        spot = one.clone()
        spot[0, patch] = 1
        small = resize_patches(spot, (8, 8), (2, 2), smooth=True)
        assert 0 <= float(small.min()) and 0 < float(small.max()) <= 1


def test_running_statistics_are_those_of_all_rows() -> None:
    """Equal batches up to the horizon: mean and deviation of everything seen; in `eval` they stand still."""
    rows = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 100
    statistics = RunningStandardise(6, momentum=0.9).double()
    for batch in rows:
        out = statistics(batch)
    seen = rows.flatten(0, 1)
    torch.testing.assert_close(statistics.mean, seen.mean(0))
    torch.testing.assert_close(statistics.var, seen.var(0, correction=0))
    torch.testing.assert_close(out, (rows[-1] - seen.mean(0)) / (seen.var(0, correction=0) + 1e-6).sqrt())
    before = statistics.mean.clone()
    statistics.eval()(rows[0] + 7)
    assert torch.equal(statistics.mean, before)
    statistics.train()(rows[0] * float("nan"))
    assert torch.equal(statistics.mean, before), "one bad batch must not spoil every later one"


def test_standardised_targets_give_every_value_its_say() -> None:
    objective = harness.build("distil", CASES["linear"])
    tokens, batch = harness.make_inputs(objective.needs)
    target = tokens[objective.needs[1]]
    scales = torch.cat((torch.tensor([1000.0]), torch.ones(19))).double()
    first = objective.loss(tokens, batch, harness.now())["loss"]
    again = harness.build("distil", CASES["linear"])
    large = target._replace(cls=target.cls * scales + 3, patches=target.patches * scales + 3)
    second = again.loss(tokens | {objective.needs[1]: large}, batch, harness.now())["loss"]
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient_and_the_teacher_none(case: str) -> None:
    harness.check_gradients("distil", CASES[case])


@pytest.mark.parametrize("case", ["mlp", "linear"])
def test_state_round_trip(case: str) -> None:
    harness.check_state("distil", CASES[case])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("distil", CASES)


@pytest.mark.parametrize("case", ["mlp", "patches"])
def test_half_precision(case: str) -> None:
    harness.check_half_precision("distil", CASES[case])


def test_overfits_eight_images() -> None:
    objective = harness.build("distil", CASES["mlp"])
    tokens, batch = harness.make_inputs(objective.needs, images=8)
    optimizer, losses = torch.optim.Adam(objective.parameters(), lr=1e-2), []
    for _ in range(150):
        loss = objective.loss(tokens, batch, harness.now())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("settings", "spec", "message"),
    [
        ({"teacher": "teacher"}, SAME, "a frozen encoder, not at the teacher.*frozen.start={of: student}"),
        ({"teacher": "other"}, harness.SPEC, "no frozen encoder 'other'; the recipe's section `frozen` has: gram"),
        ({"view": "globl"}, harness.SPEC, "no view 'globl'"),
        ({"teacher_view": "local"}, harness.SPEC, "'local' has 3 crops, 'global' has 2: set views.local.like=global"),
        ({"head": "none"}, harness.SPEC, "the student has 32 and gram has 20: set head to linear or mlp"),
        ({}, replace(SAME, frozen={"gram": replace(SAME, family="pooled")}), "gram: no ViT or Swin.*set patches to 0"),
        ({}, replace(SAME, family="pooled", frozen={"gram": SAME}), "student: no ViT or Swin.*set patches to 0"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_named(settings: dict[str, Any], spec: EncoderSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.build("distil", LARGE | settings, spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooled": 0.0, "patches": 0.0}, "nothing is matched"),
        ({"head": "none", "targets": "standardised"}, "set targets to raw, or head to linear"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.build("distil", LARGE | settings)


# With encoders


def recipe_of(frozen: dict[str, Any], objectives: dict[str, Any], name: str = "vit", **run: Any) -> Recipe:
    encoders = {
        "vit": ("vit_tiny_patch16_224", {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}),
        "swin": (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
        ),
    }
    return build_recipe(
        {
            "run": {"length": "4 steps", "batch_size": 4, "out": "out", "workers": 0, "checkpoint_every": "2 steps"}
            | run,
            "encoder": {"name": encoders[name][0], "args": encoders[name][1]},
            "data": {"source": "embedded:fashion_mnist", "limit": 16, "mean": [0.3] * 3, "std": [0.4] * 3},
            "views": {"plain": {"size": 64}, "global": {"size": 64, "crops": 2}},
            "masks": {
                "random": {"kind": "random", "view": "plain", "ratio": 0.75},
                "block": {"kind": "block", "view": "global", "min_tokens": 1},
            },
            "objectives": objectives,
            "frozen": frozen,
            "optimizer": {"lr": 1e-3, "lr_per": None, "weight_decay": 0.04},
            "monitor": {"probe_every": None, "log_every": 2, "k": 5},
            "export": {"verify": False},
        }
    )  # fmt: skip


def assemble(recipe: Recipe) -> Pretrainer:
    return build_pretrainer(recipe, [0.3] * 3, [0.4] * 3, layout=Layout(1, 4, 1))


def first_batch(recipe: Recipe, pretrainer: Pretrainer) -> Batch:
    views, masks = used_views(recipe, pretrainer)
    named = ({name: recipe.views[name] for name in views}, {name: recipe.masks[name] for name in masks})
    spec = pretrainer.spec
    sizes = {"batch_size": 4, "micro_batch": 4, "total_steps": 4}
    loader = Loader(open_source(recipe.data), recipe.data, *named, grids=spec.grids, stride=spec.stride, **sizes)
    return next(loader.iterate())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large") / "encoder"
    write_encoder(folder)  # patches of 32 pixels
    return str(folder)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_mixed_with_masked_objectives_every_parameter_learns(name: str, large: str) -> None:
    heads = {"out_dim": 8, "hidden": 8, "bottleneck": 4, "local_view": None}
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    masked = {"mae": decoder} if name == "vit" else {"simmim": {"mask": "random"}}
    anchor = {"name": "distil", "teacher": "start", "head": "none", "view": "global", "mask": "block"}
    both = {"ibot": heads, "distil": {"hidden": 8}, "anchor": anchor}
    recipe = recipe_of({"large": {"weights": large}, "start": {"of": "student"}}, masked | both, name)
    pretrainer = assemble(recipe).train()
    needs = [need for part in pretrainer.parts.values() for need in part.needs]
    assert len(pretrainer.plan) < len(needs), "the anchor looks at ibot's pass"
    with torch.autocast("cpu", torch.bfloat16):
        loss, logs = pretrainer(first_batch(recipe, pretrainer), Progress(0, 4, 4))
    loss.backward()
    assert not [name for name, p in pretrainer.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None for p in pretrainer.frozen.parameters())
    assert logs["distil/loss"].dtype == torch.float32 and logs["distil/patches"] > 0 and logs["anchor/loss"] > 0
    assert describe_plan(pretrainer)


def test_a_convolutional_teacher_has_pooled_features(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_download(monkeypatch)
    pooled = {"hidden": 8, "patches": 0.0}
    recipe = recipe_of({"large": {"weights": "resnet10t"}}, {"distil": pooled})
    pretrainer = assemble(recipe).train()
    assert pretrainer.spec.frozen["large"].dim == 512
    loss, _ = pretrainer(first_batch(recipe, pretrainer), Progress(0, 4, 4))
    loss.backward()
    assert all(p.grad is not None for p in pretrainer.parts["distil"].parameters())
    with pytest.raises(ValueError, match="objectives.distil: large: no ViT or Swin.*set patches to 0"):
        assemble(recipe_of({"large": {"weights": "resnet10t"}}, {"distil": {"hidden": 8}}))


def test_views_that_do_not_fit_the_teacher_are_resized_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of 14 pixels: 64 is no multiple, 56 gives 4 x 4."""
    _without_download(monkeypatch)
    name = "vit_small_patch14_dinov2"
    with pytest.raises(ValueError, match="frozen.large: image size 64 x 64 is no multiple of 14.*frozen.large.size"):
        assemble(recipe_of({"large": {"weights": name}}, {"distil": {"hidden": 8}}))
    recipe = recipe_of({"large": {"weights": name, "size": 56}}, {"distil": {"hidden": 8}})
    pretrainer = assemble(recipe)
    assert pretrainer.spec.frozen["large"].grids["plain"] == (4, 4)
    batch, tokens = pretrainer.encode(first_batch(recipe, pretrainer), Progress(0, 4, 4))
    assert tokens[Forward("large", "plain")].patches.shape == (4, 16, 384)
    small = torch.nn.functional.interpolate(batch.views["plain"], (56, 56), mode="bilinear", antialias=True)
    frozen = pretrainer.frozen["large"]
    torch.testing.assert_close(frozen(small).cls, tokens[Forward("large", "plain")].cls)
    with pytest.raises(RecipeError, match="size is for given `weights`"):
        recipe_of({"large": {"of": "student", "size": 56}}, {"distil": {}})
    with pytest.raises(RecipeError, match="size is a number of pixels or"):
        recipe_of({"large": {"weights": "x", "size": [56]}}, {"distil": {}})


def _without_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's factory with random weights in the place of trained ones."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **args: create(name, **args))


def test_given_weights_are_no_part_of_a_checkpoint_and_others_are_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "large")
    distil = {"distil": {"hidden": 8, "targets": "standardised"}}
    recipe = recipe_of({"large": {"weights": str(tmp_path / "large")}}, distil, out=str(tmp_path / "run"))

    def finish(resume: bool) -> dict[str, Tensor]:
        assert pretrain(recipe, resume=resume) == 0
        found = latest(tmp_path / "run" / "checkpoints")
        assert found is not None and found.name.endswith("4")
        return load(found)[0]

    whole = finish(resume=False)
    assert not [name for name in whole if name.startswith("model.frozen.")]
    assert any(name.endswith("statistics.patches.mean") for name in whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")  # as if it had been killed after step 2
    again = finish(resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    shutil.rmtree(tmp_path / "large")
    write_encoder(tmp_path / "large", seed=1)
    with pytest.raises(ValueError, match=r"the weights of frozen.large \(sha256\): was '.*', is '"):
        pretrain(recipe, resume=True)
