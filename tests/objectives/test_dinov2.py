from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.cross_entropy import across_views
from hybrid_ssl.objectives.dinov2 import DINOv2, patch_loss, spread_loss
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"out_dim": 24, "hidden": 16, "bottleneck": 8, "teacher_temperature": 0.05}
CASES = {
    "sinkhorn": SMALL,
    "center, shared head": {**SMALL, "targets": "center", "shared_head": True, "norm_last_layer": True},
    "heads of other widths": {**SMALL, "patch_out_dim": 12, "patch_bottleneck": 6},
    "center, global only": {**SMALL, "targets": "center", "local_view": None, "koleo_weight": 0.0},
}


def build(settings: harness.Settings) -> DINOv2:
    """Weights large enough to matter; the teacher's differ from the student's."""
    objective = harness.build("dinov2", settings)
    assert isinstance(objective, DINOv2)
    torch.manual_seed(3)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return objective


def ce(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits / 0.1, dim=-1)).sum(-1)


def published_sinkhorn(logits: Tensor) -> Tensor:
    """The released form, with all its constants: prototypes x samples, in the domain of probabilities."""
    q = ((logits - logits.max()) / 0.05).exp().T
    count = q.shape[1]
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / count
    return (q * count).T


def published(objective: DINOv2, inputs: harness.Inputs, centers: list[Tensor] | None) -> dict[str, Tensor]:
    """The released weighting: 2 / 18 times the mean over both crossed pairs, local pairs summed / 18 (here 2 / 8)."""
    tokens, batch = inputs
    assert objective.local is not None
    masked, local, target = (tokens[need] for need in (objective.masked, objective.local, objective.target))
    mask = batch.masks["block"]
    with torch.no_grad():
        teacher_cls, teacher_patch = objective.teacher_heads(target.cls, target.patches[mask])
        if centers is None:
            q_cls, q_patch = published_sinkhorn(teacher_cls), published_sinkhorn(teacher_patch)
        else:
            q_cls, q_patch = (
                ((x - c) / 0.05).softmax(-1) for x, c in zip((teacher_cls, teacher_patch), centers, strict=True)
            )
            centers[:] = [0.9 * c + 0.1 * x.mean(0) for x, c in zip((teacher_cls, teacher_patch), centers, strict=True)]
    s_global, s_patch = objective.heads(masked.cls, masked.patches[mask])
    s_local, _ = objective.heads(local.cls, masked.patches[:0].flatten(0, 1))
    pairs = 2 + 2 * 3
    swapped = torch.cat(list(reversed(q_cls.chunk(2))))  # row i of student A meets teacher B
    class_global = 2 * ce(swapped, s_global).mean() / pairs
    class_local = sum(ce(q, s).mean() for q in q_cls.chunk(2) for s in s_local.chunk(3)) / pairs
    weight = (1 / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(mask)[mask]
    patch = (weight * ce(q_patch, s_patch)).sum() / len(mask)
    koleo = torch.zeros(())
    for crop in masked.cls.chunk(2):
        x = F.normalize(crop, dim=-1)
        distances = torch.cdist(x, x) + 9 * torch.eye(len(x))
        koleo = koleo - (distances.min(1).values).log().mean()
    return {"global": class_global, "local": class_local, "patch": patch, "koleo": koleo}


@pytest.mark.parametrize("case", ["sinkhorn", "center, shared head", "heads of other widths"])
def test_loss_and_gradients_equal_the_published_form_for_two_steps(case: str) -> None:
    objective = build(CASES[case] | {"koleo_weight": 0.3, "patch_weight": 1.4, "class_weight": 0.8})
    centers = [torch.zeros(24).double(), torch.zeros(24).double()] if "center" in case else None
    parameters = list(objective.heads.parameters())
    for step in range(2):
        tokens, batch = inputs = harness.make_inputs(objective.needs, images=3, seed=step)
        terms = published(objective, inputs, centers)
        leaves = [*parameters, *(x for need in objective.needs if need.net == "student" for x in tokens[need][:2])]
        logs = objective.loss(tokens, batch, harness.now(step))
        torch.testing.assert_close(logs["class_loss"], (terms["global"] + terms["local"]).detach())
        torch.testing.assert_close(logs["patch_loss"], terms["patch"].detach())
        torch.testing.assert_close(logs["koleo"], terms["koleo"].detach(), rtol=1e-6, atol=1e-6)
        expected = 0.8 * (terms["global"] + terms["local"]) + 1.4 * terms["patch"] + 0.3 * terms["koleo"]
        found, wanted = (torch.autograd.grad(y, leaves, allow_unused=True) for y in (logs["loss"], expected))
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours is None) == (theirs is None)  # patches of local crops have no part in either
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)  # KoLeo's 1e-8
        if centers is not None:
            assert objective.center is not None and objective.patch_center is not None
            torch.testing.assert_close([objective.center.value, objective.patch_center.value], centers)


def test_two_global_and_eight_local_crops_make_18_equal_terms() -> None:
    """Give each student crop one own prototype: the gradient on its logit shows how often it counts."""
    draw = torch.Generator().manual_seed(0)
    targets = torch.rand(2, 5, 7, generator=draw).softmax(-1)
    logits = torch.randn(10, 5, 7, generator=draw)
    pairs = [ce(targets[i], logits[v]).mean() for i in range(2) for v in range(10) if v != i]
    assert len(pairs) == 18
    torch.testing.assert_close(across_views(targets, logits, 0.1), torch.stack(pairs).mean())
    halved = [ce(targets[i], logits[v]).mean() * (1 if v < 2 else 0.5) for i in range(2) for v in range(10) if v != i]
    torch.testing.assert_close(across_views(targets, logits, 0.1, local_weight=0.5), torch.stack(halved).mean())


def test_a_teachers_crop_never_meets_itself() -> None:
    targets = torch.eye(6)[:2].unsqueeze(1)  # crop 0 is prototype 0, crop 1 is prototype 1
    crossed, straight = (torch.eye(6)[order].unsqueeze(1) for order in ([1, 0], [0, 1]))
    assert across_views(targets, crossed, 0.1) < 0.01 < 9 < across_views(targets, straight, 0.1)


def test_a_crop_without_hidden_patches_stays_in_the_denominator() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :3] = mask[2, 5] = True
    rows = mask.flatten().nonzero().squeeze(1)
    targets, logits = torch.eye(5)[:4], torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    each = ce(targets, logits)
    torch.testing.assert_close(patch_loss(targets, logits, rows, mask, 0.1), (each[:3].mean() + each[3]) / 4)


def test_koleo_never_mixes_the_crops_of_an_image() -> None:
    """Two crops with equal features: mixed, each would find its twin at distance 0."""
    crop = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    alone = spread_loss(crop.unsqueeze(0))
    torch.testing.assert_close(spread_loss(torch.stack((crop, crop))), 2 * alone)


def test_koleo_reads_class_tokens_before_the_head() -> None:
    objective = build({**SMALL, "koleo_weight": 1.0})
    tokens, batch = harness.make_inputs(objective.needs)
    before = objective.loss(tokens, batch, harness.now())["koleo"]
    with torch.no_grad():
        for parameter in objective.heads.parameters():
            parameter.mul_(2)
    assert torch.equal(objective.loss(tokens, batch, harness.now())["koleo"], before)
    torch.testing.assert_close(before, spread_loss(tokens[objective.masked].cls.unflatten(0, (2, -1))).detach())


def test_patch_targets_ignore_visible_patches() -> None:
    for case in ("sinkhorn", "center, shared head"):
        losses = []
        for noise in (0.0, 1.0):
            objective = build(CASES[case])
            tokens, batch = harness.make_inputs(objective.needs)
            visible = ~batch.masks["block"]
            with torch.no_grad():
                tokens[objective.target].patches[visible] += noise
                tokens[objective.masked].patches[visible] += noise
            first = objective.loss(tokens, batch, harness.now())["loss"]
            losses += [(first, objective.loss(tokens, batch, harness.now(1))["loss"])]  # the second with moved centres
        assert losses[0] == losses[1]


def test_nothing_hidden_at_all_is_no_patch_loss_and_no_nan() -> None:
    for settings in CASES.values():
        objective = build(settings)
        tokens, batch = harness.make_inputs(objective.needs, masks={"block": torch.zeros(8, 16, dtype=torch.bool)})
        logs = objective.loss(tokens, batch, harness.now())
        logs["loss"].backward()
        assert logs["patch_loss"] == 0 and all(value.isfinite() for value in logs.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.heads.parameters())
        assert all(buffer.isfinite().all() for buffer in objective.buffers())


def test_both_centers_follow_their_momentum() -> None:
    slow, fast = (build(CASES["center, shared head"] | {"center_momentum": momentum}) for momentum in (0.9, 0.5))
    for objective in (slow, fast):
        objective.loss(*harness.make_inputs(objective.needs), harness.now())
    for name in ("center", "patch_center"):
        torch.testing.assert_close(getattr(fast, name).value, 5 * getattr(slow, name).value)


def test_held_prototypes_are_those_of_both_heads_with_their_lengths() -> None:
    shapes = {case: [tuple(p.shape) for p in next(iter(build(CASES[case]).param_rules())).params] for case in CASES}
    assert shapes["sinkhorn"] == [(24, 8), (24, 1)] * 2
    assert shapes["heads of other widths"] == [(24, 8), (24, 1), (12, 6), (12, 1)]
    assert shapes["center, shared head"] == [(24, 8)]


def test_needs_the_masked_pass_and_the_teachers_whole_crops() -> None:
    whole, local = Forward("teacher", "global"), Forward("student", "local")
    assert build(SMALL).needs == (Forward("student", "global", "block"), local, whole)
    assert build(CASES["center, global only"]).needs == (Forward("student", "global", "block"), whole)


def test_local_weight_is_dinov3s() -> None:
    """2/8 of the mean global pair, and half of 6/8 of the mean local pair."""
    tokens, batch = inputs = harness.make_inputs(build(SMALL).needs)
    terms = published(build(SMALL), inputs, None)
    found = build({**SMALL, "local_weight": 0.5}).loss(tokens, batch, harness.now())["class_loss"]
    torch.testing.assert_close(found, (terms["global"] + terms["local"] / 2).detach())


@pytest.mark.parametrize("case", ["sinkhorn", "center, shared head"])
def test_overfits_eight_images(case: str) -> None:
    losses = harness.overfit("dinov2", CASES[case])
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("dinov2", CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    harness.check_state("dinov2", CASES[case])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("dinov2", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("dinov2", CASES["center, shared head"])


def test_swins_grid_of_output_tokens() -> None:
    spec = replace(harness.SPEC, dim=48, stride=32, family="swin", grids={"global": (7, 6), "local": (3, 3)})
    harness.check_gradients("dinov2", SMALL, replace(spec, crops={"global": 2, "local": 3}))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="a shared head has no patch_out_dim: leave it out, or set shared_head: false"):
        build({**SMALL, "shared_head": True, "patch_out_dim": 12})
    with pytest.raises(ValueError, match="koleo_weight"):
        build({**SMALL, "koleo_weight": -0.1})


@pytest.mark.parametrize(
    "changed",
    [
        {"out_dim": 20},
        {"patch_out_dim": 30},
        {"hidden": 20},
        {"bottleneck": 12},
        {"patch_bottleneck": 6},
        {"student_temperature": 0.2},
        {"teacher_temperature": 0.07},
        {"targets": "center"},
        {"sinkhorn_iterations": 1},
        {"local_view": None},
        {"norm_last_layer": True},
        {"class_weight": 0.5},
        {"patch_weight": 0.5},
        {"koleo_weight": 0.2},
        {"local_weight": 0.5},
        {"shared_head": True},
    ],
    ids=str,
)
def test_every_setting_changes_the_run(changed: dict[str, object]) -> None:
    results = [harness.train(harness.build("dinov2", settings), lr=1.0) for settings in (SMALL, {**SMALL, **changed})]
    assert results[0]["losses"] != results[1]["losses"]
