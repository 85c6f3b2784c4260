import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.contrast import unit
from hybrid_ssl.nn.swapped import balanced_codes, swav_loss
from hybrid_ssl.objectives.swav import SwAV
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"prototypes": 12, "hidden": 16, "dim": 8}
QUEUE = {**SMALL, "queue": 7, "queue_starts": "0 steps"}  # no multiple of the batches below
CASES = {"multi-crop": SMALL, "global only": {**SMALL, "local_view": None}, "queue": QUEUE}


def draw_logits(views: int, rows: int, count: int = 9, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(views, rows, count, generator=draw, dtype=torch.float64) - 0.5


def sinkhorn_by_hand(logits: Tensor, epsilon: float, iterations: int) -> Tensor:
    """As the paper's pseudocode: exponentials, rows of prototypes and columns of samples in turn."""
    q = (logits / epsilon).exp().T  # [K, B]
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def by_hand(logits: Tensor, queued: Tensor | None, targets: int, temperature: float = 0.1) -> float:
    """Mean over target crops of the mean over the other crops of the cross-entropy."""
    losses = []
    for i in range(targets):
        rows = logits[i] if queued is None else torch.cat((queued[i], logits[i]))  # the batch last, as published
        code = sinkhorn_by_hand(rows, 0.05, 3)[-logits.shape[1] :]
        shares = [(logits[v] / temperature).softmax(1) for v in range(len(logits)) if v != i]
        losses.append(sum(float(-(code * share.log()).sum(1).mean()) for share in shares) / len(shares))
    return sum(losses) / targets


@pytest.mark.parametrize("queue", [0, 7])
def test_loss_equals_the_formula_with_codes_for_each_crop_by_itself(queue: int) -> None:
    logits = draw_logits(5, 6)
    queued = draw_logits(2, queue, seed=1) if queue else None
    loss, codes = swav_loss(logits, 2, queued)
    assert loss.item() == pytest.approx(by_hand(logits, queued, 2), rel=1e-12)
    assert codes.shape == (2, 6, 9)
    torch.testing.assert_close(codes.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    joined = sinkhorn_by_hand(logits[:2].flatten(0, 1), 0.05, 3).unflatten(0, (2, 6))
    assert (codes - joined).abs().max() > 1e-3  # one Sinkhorn over both crops would be another method


def test_loss_and_gradient_equal_lightlys() -> None:
    theirs = pytest.importorskip("lightly.loss").SwaVLoss()
    logits = draw_logits(5, 6).requires_grad_()
    queued = draw_logits(2, 7, seed=1)
    for queue in (None, queued):
        ours, _ = swav_loss(logits, 2, queue)
        other = theirs(list(logits[:2]), list(logits[2:]), None if queue is None else list(queue)).squeeze()
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=0)
        mine, lightlys = (torch.autograd.grad(loss, logits)[0] for loss in (ours, other))
        torch.testing.assert_close(mine, lightlys, rtol=1e-5, atol=1e-8)


def test_codes_carry_no_gradient_and_survive_cosines_of_one() -> None:
    logits = torch.ones(2, 4, 9, dtype=torch.float16).requires_grad_()  # exp(1 / 0.05) is beyond fp16
    codes = balanced_codes(logits)
    assert not codes.requires_grad and codes.dtype == torch.float32
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / 9))


def test_three_steps_with_a_queue_equal_the_formula() -> None:
    objective = harness.build("swav", {**SMALL, "queue": 6, "queue_starts": "1 steps"})
    assert isinstance(objective, SwAV) and objective.local is not None
    torch.manual_seed(3)
    for p in objective.parameters():
        torch.nn.init.normal_(p)
    w1, b1, gamma, beta, w2, b2 = (p.detach() for p in objective.projector.parameters())
    images, kept = 3, []  # embeddings [T, B, d] of earlier steps
    for step in range(5):
        tokens, batch = harness.make_inputs(objective.needs, images, seed=step)
        x = torch.cat((tokens[objective.whole].cls, tokens[objective.local].cls)).detach() @ w1.T + b1
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * gamma + beta  # over all crops
        rows = unit(x.relu() @ w2.T + b2).unflatten(0, (5, images))
        with torch.no_grad():
            objective.prototypes.weight.mul_(1.1).add_(0.1)  # old embeddings are scored with the current prototypes
        prototypes = unit(objective.prototypes.weight.detach())
        queued = None
        if step >= 3:  # filled by steps 1 and 2, read from step 3 on
            queued = torch.cat(kept[-2:], dim=1) @ prototypes.T
        loss = objective.loss(tokens, batch, harness.now(step))["loss"]
        assert loss.item() == pytest.approx(by_hand(rows @ prototypes.T, queued, 2), rel=1e-9), step
        kept.append(rows[:2])


def test_queue_is_empty_before_it_starts_and_unused_until_full() -> None:
    for starts, used in (("3 steps", 5), ("0 steps", 2)):
        objective = harness.build("swav", {**QUEUE, "queue_starts": starts})
        without = harness.build("swav", SMALL)
        assert isinstance(objective, SwAV) and objective.queue is not None
        first = objective.queue.rows.clone()
        for step in range(used + 1):
            inputs = harness.make_inputs(without.needs, seed=step)
            if step <= int(starts[0]):
                assert torch.equal(objective.queue.rows, first)
            losses = [each.loss(*inputs, harness.now(step))["loss"].item() for each in (objective, without)]
            assert (losses[0] == losses[1]) == (step < used), (starts, step)
        assert int(objective.queue.filled) == 7


def test_prototypes_start_at_unit_length_and_are_held() -> None:
    objective = harness.build("swav", {**SMALL, "hold_prototypes": "313 steps"})
    assert isinstance(objective, SwAV)
    torch.testing.assert_close(objective.prototypes.weight.norm(dim=1), torch.ones(12, dtype=torch.float64))
    (rule,) = objective.param_rules()
    assert rule.params == (objective.prototypes.weight,) and rule.hold == "313 steps"


def test_a_fresh_head_has_a_loss_near_log_k() -> None:
    objective = harness.build("swav", {**SMALL, "prototypes": 3000, "dim": 128})
    logs = objective.loss(*harness.make_inputs(objective.needs), harness.now())
    assert logs["chance"].item() == pytest.approx(math.log(3000))
    assert logs["loss"].item() == pytest.approx(math.log(3000), rel=0.15)


def test_uniform_collapse_shows_in_the_metrics() -> None:
    objective = harness.build("swav", SMALL)
    tokens, batch = harness.make_inputs(objective.needs)
    healthy = objective.loss(tokens, batch, harness.now())
    assert healthy["teacher_entropy"] < 0.9 < healthy["teacher_spread"] and healthy["kl"] > 0.1
    one = {need: both._replace(cls=both.cls[:1].expand_as(both.cls)) for need, both in tokens.items()}
    logs = objective.loss(one, batch, harness.now())
    assert logs["teacher_entropy"].item() == pytest.approx(1)


def test_asks_for_the_students_passes_only() -> None:
    assert harness.build("swav", SMALL).needs == (Forward("student", "global"), Forward("student", "local"))
    assert harness.build("swav", CASES["global only"]).needs == (Forward("student", "global"),)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("swav", CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    harness.check_state("swav", CASES[case])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("swav", {**CASES, "short queue": {**QUEUE, "queue": 4}})  # two of three steps read it


def test_half_precision() -> None:
    harness.check_half_precision("swav", SMALL)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("swav", SMALL)
    assert losses[-1] < 0.3 * losses[0]


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("swav", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="no view 'small'.*global, local, plain"):
        harness.build("swav", {"local_view": "small"})
    with pytest.raises(ValueError, match="one crop and there is no local view"):
        harness.build("swav", {"global_view": "plain", "local_view": None})


CHANGES = [
    {"prototypes": 20},
    {"hidden": 20},
    {"dim": 12},
    {"temperature": 0.2},
    {"epsilon": 0.03},
    {"iterations": 1},
    {"local_view": None},
    {"queue": 4},
    {"queue_starts": "1 steps"},
]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_every_setting_changes_the_run(changed: dict[str, object]) -> None:
    base = {**QUEUE, "queue": 8}  # four images a step: read in the third one
    results = [harness.train(harness.build("swav", settings)) for settings in (base, {**base, **changed})]
    assert results[0]["losses"] != results[1]["losses"]
