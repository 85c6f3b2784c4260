"""The one module: what moves the teachers, what noise depends on, and that small batches add up to a large one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hybrid_ssl.assemble import build_groups, build_loader, build_pretrainer, lay_out
from hybrid_ssl.config import Recipe
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.optim import build_optimizer, set_step
from hybrid_ssl.plan import Batch, Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.schedule import value_at
from tests.runs import HEAD, MAE_ENTRY, MOCO_ENTRY, tiny_recipe

NOW = Progress(0, 10, 8)


def build(recipe: Recipe) -> Pretrainer:
    return build_pretrainer(recipe, [0.3], [0.3], layout=lay_out(recipe, 1)).double()


def batches(recipe: Recipe, pretrainer: Pretrainer) -> Iterable[Batch]:
    return build_loader(recipe, open_source(recipe.data), pretrainer, lay_out(recipe, 1), total_steps=10).iterate()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# teachers


def test_teacher_exists_only_if_some_pass_needs_it() -> None:
    assert build(tiny_recipe({"mae": MAE_ENTRY})).teacher is None
    teacher = build(tiny_recipe("ibot")).teacher
    assert teacher is not None and teacher.mask_token is None
    assert not any(p.requires_grad for p in teacher.parameters())


def test_mask_token_exists_only_if_some_pass_masks_without_dropping() -> None:
    assert build(tiny_recipe("mae+moco_v3")).student.mask_token is None
    assert build(tiny_recipe("ibot")).student.mask_token is not None


def test_teachers_begin_as_copies_and_move_by_the_momentum() -> None:
    pretrainer = build(tiny_recipe("mae+moco_v3"))
    moco = pretrainer.objectives["moco_v3"]
    pairs = [(pretrainer.teacher, pretrainer.student), (moco.teacher_projector, moco.projector)]
    for teacher, student in pairs:
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    before = [[p.detach().clone() for p in teacher.parameters()] for teacher, _ in pairs]
    with torch.no_grad():
        for parameter in pretrainer.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    pretrainer.move_teachers(0.9)
    for (teacher, student), old in zip(pairs, before, strict=True):
        for parameter, target, was in zip(teacher.parameters(), student.parameters(), old, strict=True):
            torch.testing.assert_close(parameter, 0.9 * was + 0.1 * target, rtol=1e-12, atol=1e-15)
    decoder = pretrainer.objectives["mae"].decoder
    assert not any("teacher" in name for name, _ in decoder.named_parameters())


def test_teacher_moved_after_the_step_with_offset_1_gives_moco_v3s_keys() -> None:
    """By hand, as in the paper: momentum of step t moves the teacher in step t, before its keys are computed."""
    recipe = tiny_recipe({"moco_v3": MOCO_ENTRY}, teacher={"offset": 1}, encoder={"drop_path": 0.0})
    official, ours = build(recipe), build(recipe)

    def keys(offset: int) -> list[Tensor]:
        """Teacher's class tokens in four steps of our order; `offset` -1: of the paper's."""
        pretrainer = copy.deepcopy(official if offset < 0 else ours)
        optimizer = build_optimizer(recipe.optimizer, build_groups(recipe, pretrainer))
        found = []
        for step, batch in zip(range(4), batches(recipe, pretrainer), strict=False):
            now = replace(NOW, step=step)
            set_step(recipe.optimizer, optimizer, 1e-2, now)
            if offset < 0:
                pretrainer.move_teachers(value_at(recipe.teacher.momentum, now))
            assert pretrainer.teacher is not None
            found.append(pretrainer.teacher(pretrainer.normalise(batch.views["global"])).cls)
            pretrainer(batch, now)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            if offset >= 0:
                pretrainer.move_teachers(value_at(recipe.teacher.momentum, replace(now, step=step + offset)))
        return found

    paper = keys(-1)
    torch.testing.assert_close(keys(1), paper, rtol=1e-12, atol=0)
    assert (keys(0)[-1] - paper[-1]).abs().max() > 1e-9  # the other index shows


def test_teacher_encoder_stays_in_eval_and_its_batchnorm_trains() -> None:
    pretrainer = build(tiny_recipe("mae+moco_v3")).train()
    assert pretrainer.student.training and pretrainer.teacher is not None and not pretrainer.teacher.training
    resnet = tiny_recipe(
        {"moco_v3": MOCO_ENTRY},
        encoder={"name": "resnet10t", "args": {}, "drop_path": 0.0},
        views={"global": {"size": 32, "crops": 2}},
        masks={},
    )
    pretrainer = build(resnet).train()
    assert pretrainer.teacher is not None
    norms = [m for m in pretrainer.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.training for norm in norms)
    before = norms[0].running_mean.clone()
    pretrainer(next(iter(batches(resnet, pretrainer))), NOW)
    assert not torch.equal(norms[0].running_mean, before)
    assert not any(m.training for m in pretrainer.eval().teacher.modules())


# losses


def test_total_is_the_weighted_sum_and_a_weight_may_be_a_ramp() -> None:
    entries = {"mae": MAE_ENTRY | {"weight": {"start": 0.0, "end": 2.0}}, "dino": HEAD | {"weight": 0.5}}
    recipe = tiny_recipe(entries)
    pretrainer = build(recipe)
    batch = next(iter(batches(recipe, pretrainer)))
    total, logs = pretrainer(batch, replace(NOW, step=5))
    assert total.item() == pytest.approx(float(1.0 * logs["mae/loss"] + 0.5 * logs["dino/loss"]), rel=1e-12)
    assert not any(value.requires_grad for value in logs.values())


def test_uint8_views_are_normalised_and_float_views_pass() -> None:
    pretrainer = build(tiny_recipe({"mae": MAE_ENTRY}))
    images = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    torch.testing.assert_close(pretrainer.normalise(images), torch.full((1, 1, 2, 2), 0.7 / 0.3).double())
    assert torch.equal(pretrainer.normalise(images.double()), images.double())


# stochastic depth and accumulation


def test_noise_is_a_function_of_seed_step_pass_and_place() -> None:
    recipe = tiny_recipe("mae+moco_v3")
    pretrainer = build(recipe)
    images = torch.zeros(16, 1, 16, 16)  # 8 images, two crops

    def noise(step: int = 0, index: int = 1, seed: int = 0, micro: int = 0, rows: int = 16) -> Tensor:
        drawn = pretrainer._noise(images[:rows], Progress(step, 10, 8, seed, micro), index, crops=2)
        assert drawn is not None
        return drawn

    whole = noise()
    assert whole.shape == (pretrainer.student.noise_rows, 16) and torch.equal(whole, noise())
    assert not any(torch.equal(whole, other) for other in (noise(step=1), noise(index=2), noise(seed=1)))
    parts = torch.stack([noise(micro=m, rows=4).unflatten(1, (2, 2)) for m in range(4)], 2)  # [rows, V, micro, 2]
    assert torch.equal(parts.flatten(1), whole)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_accumulated_micro_batches_equal_the_large_batch_for_mae(drop_path: float) -> None:
    found = []
    for micro in (8, 2):
        recipe = tiny_recipe({"mae": MAE_ENTRY}, run={"micro_batch": micro}, encoder={"drop_path": drop_path})
        pretrainer = build(recipe).train()
        stream = iter(batches(recipe, pretrainer))
        for number in range(8 // micro):
            (pretrainer(next(stream), replace(NOW, micro=number))[0] / (8 // micro)).backward()
        found.append(gradients(pretrainer))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)


def test_stochastic_depth_acts_in_training_only_and_in_every_family() -> None:
    for encoder, size in [({}, 16), ({"name": "convnext_atto", "args": {"depths": [1, 1, 1, 1]}}, 32)]:
        recipe = tiny_recipe(
            {"moco_v3": MOCO_ENTRY},
            encoder=encoder | {"drop_path": 0.9},
            views={"global": {"size": size, "crops": 2}},
            masks={},
        )
        pretrainer = build(recipe)
        batch = next(iter(batches(recipe, pretrainer)))
        trained = [pretrainer.train().encode(batch, replace(NOW, step=step))[1] for step in (0, 0, 1)]
        query = pretrainer.plan[0]
        assert torch.equal(trained[0][query].cls, trained[1][query].cls)
        assert not torch.equal(trained[0][query].cls, trained[2][query].cls)
        tested = [pretrainer.eval().encode(batch, replace(NOW, step=step))[1] for step in (0, 1)]
        assert torch.equal(tested[0][query].cls, tested[1][query].cls)


# what cannot work


@pytest.mark.parametrize(
    ("objectives", "sections", "words"),
    [
        ({"mae": MAE_ENTRY}, {"encoder": {"name": "swin_tiny_patch4_window7_224", "args": {"window_size": 2}},
          "views": {name: {"size": 64} for name in ("plain", "global", "local")}}, "cannot be dropped; use a ViT"),
        ({"simmim": {"view": "plain", "mask": "random"}}, {"encoder": {"name": "resnet10t", "args": {}}},
         "ResNet takes no mask token"),
        ({"mae": MAE_ENTRY | {"mask": "block", "view": "global"}}, {}, "use kind: random"),
        ({"mae": MAE_ENTRY | {"mask": "nope"}}, {}, "there is no mask 'nope'"),
        ({"mae": MAE_ENTRY | {"view": "nope"}}, {}, "view 'nope'"),
        ({"mae": MAE_ENTRY | {"view": "global"}}, {}, "mask 'random' is for view 'plain'"),
        ({"mae": MAE_ENTRY}, {"encoder": {"name": "resnet10t", "args": {}}}, "patches cannot be masked"),
        ({"moco_v3": MOCO_ENTRY}, {"encoder": {"name": "resnet10t", "args": {}}, "run": {"compile": True}},
         "run.compile works on the blocks of a ViT or Swin; resnet10t has none"),
    ],
)  # fmt: skip
def test_pass_that_the_encoder_cannot_run_is_refused(objectives: dict, sections: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(tiny_recipe(objectives, **sections))
