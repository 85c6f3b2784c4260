from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.objectives.ibot import IBOT, IBOTHead
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"out_dim": 24, "hidden": 16, "bottleneck": 8, "teacher_temperature": 0.05, "patch_temperature": 0.06}
CASES = {
    "shared head": SMALL,
    "separate heads": {**SMALL, "shared_head": False, "patch_out_dim": 12, "norm_last_layer": False},
    "patches only": {**SMALL, "lambda1": 0.0},
    "global only": {**SMALL, "local_view": None, "lambda2": 0.5},
}
Centers = tuple[Tensor, Tensor]


def build(settings: harness.Settings) -> IBOT:
    """Weights large enough to matter; the teacher's differ from the student's."""
    objective = harness.build("ibot", settings)
    assert isinstance(objective, IBOT)
    torch.manual_seed(3)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return objective


def classes(head: IBOTHead, cls: Tensor) -> Tensor:
    return head.class_logits(head.dino.embed(cls))


def patches(head: IBOTHead, tokens: Tensor) -> Tensor:
    return head.patch_logits(head.dino.embed(tokens))


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits / 0.1, dim=-1)).sum(-1)


def published(objective: IBOT, inputs: harness.Inputs, centers: Centers) -> tuple[Tensor, Tensor, Centers]:
    """Class loss, patch loss, new centres in the plain way: every patch through every prototype, a loop over pairs."""
    tokens, batch = inputs
    assert objective.local is not None
    masked, local, target = (tokens[need] for need in (objective.masked, objective.local, objective.target))
    masks = batch.masks["block"].double().chunk(2)  # [B, N] of each crop
    with torch.no_grad():
        target_classes = classes(objective.teacher_head, target.cls).chunk(2)  # [B, K] of each crop
        target_patches = patches(objective.teacher_head, target.patches).chunk(2)  # [B, N, K] of each crop
    views = [*classes(objective.head, masked.cls).chunk(2), *classes(objective.head, local.cls).chunk(3)]
    hidden = patches(objective.head, masked.patches).chunk(2)

    class_terms, patch_terms = [], []
    for g in range(2):
        q_class = ((target_classes[g] - centers[0]) / 0.05).softmax(-1)
        q_patch = ((target_patches[g] - centers[1]) / 0.06).softmax(-1)
        for v, view in enumerate(views):
            if v == g:
                each = cross_entropy(q_patch, hidden[g]) * masks[g]  # [B, N]
                patch_terms.append((each.sum(1) / masks[g].sum(1).clamp(min=1)).mean())
            else:
                class_terms.append(cross_entropy(q_class, view).mean())
    assert (len(class_terms), len(patch_terms)) == (2 * 4, 2)
    means = (torch.cat(target_classes).mean(0), torch.cat(target_patches).mean((0, 1)))
    new = (0.9 * centers[0] + 0.1 * means[0], 0.8 * centers[1] + 0.2 * means[1])
    return torch.stack(class_terms).mean(), torch.stack(patch_terms).mean(), new


@pytest.mark.parametrize("case", ["shared head", "separate heads"])
def test_loss_gradients_and_centers_equal_the_published_form_for_two_steps(case: str) -> None:
    objective = build({**CASES[case], "patch_center_momentum": 0.8, "lambda1": 0.7, "lambda2": 1.3})
    parameters = list(objective.head.parameters())
    centers = (torch.zeros(24).double(), torch.zeros_like(objective.patch_center.value))
    for step in range(2):
        tokens, batch = inputs = harness.make_inputs(objective.needs, images=3, seed=step)
        class_loss, patch_loss, centers = published(objective, inputs, centers)
        leaves = [*parameters, *(x for need in objective.needs if need.net == "student" for x in tokens[need][:2])]
        logs = objective.loss(tokens, batch, harness.now(step))
        torch.testing.assert_close(logs["class_loss"], class_loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(logs["patch_loss"], patch_loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(objective.center.value, centers[0])
        torch.testing.assert_close(objective.patch_center.value, centers[1])
        expected = 0.7 * class_loss + 1.3 * patch_loss
        torch.testing.assert_close(logs["loss"], expected, rtol=1e-12, atol=0)
        found, wanted = (torch.autograd.grad(y, leaves, allow_unused=True) for y in (logs["loss"], expected))
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours is None) == (theirs is None)  # patches of local crops have no part in either
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_patch_loss_equals_lightlys_while_the_center_is_zero() -> None:
    lightly = pytest.importorskip("lightly.loss")
    theirs = lightly.IBOTPatchLoss(SMALL["out_dim"], teacher_temp=0.06)  # its centre knows masked patches only
    objective = build(SMALL)
    tokens, batch = harness.make_inputs(objective.needs)
    mask = batch.masks["block"]
    target = patches(objective.teacher_head, tokens[objective.target].patches[mask])
    student = patches(objective.head, tokens[objective.masked].patches[mask])
    expected = theirs(target.detach(), student, mask.unflatten(1, (4, 4))).detach()
    logs = objective.loss(tokens, batch, harness.now())
    torch.testing.assert_close(logs["patch_loss"], expected, rtol=1e-6, atol=0)


def test_loss_ignores_visible_patches() -> None:
    objective = build(SMALL)
    tokens, batch = harness.make_inputs(objective.needs)
    objective.loss(tokens, batch, harness.now())["loss"].backward()
    gradient = tokens[objective.masked].patches.grad
    assert gradient is not None
    assert torch.equal(gradient.any(-1), batch.masks["block"])


def test_a_crop_without_hidden_patches_counts_as_zero() -> None:
    objective = build(CASES["patches only"])
    hidden = torch.zeros(8, 16, dtype=torch.bool)
    hidden[:4, :5] = True  # crops 0..3 of 8 are masked
    tokens, batch = harness.make_inputs(objective.needs, masks={"block": hidden})
    half = objective.loss(tokens, batch, harness.now())["patch_loss"]
    rows = torch.arange(4).repeat(2)  # the masked crops twice
    doubled = {
        need: type(both)(*(x.detach()[rows].requires_grad_(x.requires_grad) for x in both[:2]))
        for need, both in tokens.items()
    }
    all_masked = build(CASES["patches only"]).loss(
        doubled, batch._replace(masks={"block": hidden[rows]}), harness.now()
    )
    torch.testing.assert_close(2 * half, all_masked["patch_loss"])


def test_nothing_hidden_at_all_is_no_patch_loss_and_no_nan() -> None:
    objective = build(CASES["shared head"])
    tokens, batch = harness.make_inputs(objective.needs, masks={"block": torch.zeros(8, 16, dtype=torch.bool)})
    logs = objective.loss(tokens, batch, harness.now())
    logs["loss"].backward()
    assert logs["patch_loss"] == 0 and all(value.isfinite() for value in logs.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.head.parameters())
    assert objective.patch_center.value.any()  # visible patches move it as well


def test_hidden_positions_from_the_loader_change_nothing() -> None:
    objective = build(SMALL)
    tokens, batch = harness.make_inputs(objective.needs)
    listed = batch._replace(hidden={"block": batch.hidden_rows("block")})
    first = objective.loss(tokens, batch, harness.now())["patch_loss"]
    assert torch.equal(build(SMALL).loss(tokens, listed, harness.now())["patch_loss"], first)


def test_shared_heads_have_one_set_of_prototypes() -> None:
    shared, apart = build(SMALL), build(CASES["separate heads"])
    assert [tuple(p.shape) for p in next(iter(shared.param_rules())).params] == [(24, 8)]
    assert [tuple(p.shape) for p in next(iter(apart.param_rules())).params] == [(24, 8), (24, 1), (12, 8), (12, 1)]
    assert not any(name.startswith("head.patch") for name in shared.state_dict())


def test_needs_the_masked_pass_and_the_teachers_whole_crops() -> None:
    whole, local = Forward("teacher", "global"), Forward("student", "local")
    assert build(SMALL).needs == (Forward("student", "global", "block"), local, whole)
    assert build(CASES["patches only"]).needs == (Forward("student", "global", "block"), whole)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("ibot", CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    harness.check_state("ibot", CASES[case])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("ibot", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("ibot", SMALL)


def test_swins_grid_of_output_tokens() -> None:
    spec = replace(harness.SPEC, dim=48, stride=32, family="swin", grids={"global": (7, 6), "local": (3, 3)})
    harness.check_gradients("ibot", SMALL, replace(spec, crops={"global": 2, "local": 3}))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="out_dim is 24 and patch_out_dim 12: leave patch_out_dim out"):
        build({**SMALL, "patch_out_dim": 12})
    with pytest.raises(ValueError, match="set shared_head: true"):
        build({**SMALL, "lambda1": 0.0, "shared_head": False})
    with pytest.raises(ValueError, match="lambda2"):
        build({**SMALL, "lambda2": 0.0})


@pytest.mark.parametrize(
    "changed",
    [
        {"out_dim": 20},
        {"hidden": 20},
        {"bottleneck": 12},
        {"student_temperature": 0.2},
        {"teacher_temperature": 0.07},
        {"patch_temperature": 0.07},
        {"center_momentum": 0.5},
        {"patch_center_momentum": 0.5},
        {"local_view": None},
        {"norm_last_layer": False},
        {"lambda1": 0.5},
        {"lambda2": 0.5},
        {"shared_head": False},
        {"shared_head": False, "patch_out_dim": 30},
    ],
    ids=str,
)
def test_every_setting_changes_the_run(changed: dict[str, object]) -> None:
    results = [harness.train(harness.build("ibot", settings), lr=1.0) for settings in (SMALL, {**SMALL, **changed})]
    assert results[0]["losses"] != results[1]["losses"]
