import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.contrast import queue_nce, unit
from hybrid_ssl.objectives.moco_v1 import MoCoV1
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"dim": 8, "queue": 5}  # no multiple of the batches below: the ring has to wrap
CASES = {"two crops": SMALL, "a view for keys": {**SMALL, "view": "plain", "key_view": "other"}}
SPEC = replace(harness.SPEC, grids={**harness.SPEC.grids, "other": (4, 4)}, crops={**harness.SPEC.crops, "other": 1})


def rows_of(count: int, dim: int = 8, seed: int = 0) -> Tensor:
    return unit(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def by_hand(queries: Tensor, keys: Tensor, queue: list[Tensor], tau: float) -> float:
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        positive = math.exp(float(query @ key) / tau)
        total -= math.log(positive / (positive + sum(math.exp(float(query @ old) / tau) for old in queue)))
    return total / len(queries)


def test_three_steps_equal_the_formula_with_a_queue() -> None:
    objective = harness.build("moco_v1", SMALL)
    assert isinstance(objective, MoCoV1)
    weight, bias = (torch.randn_like(p) for p in objective.teacher_projector.parameters())
    for p, value in zip(objective.teacher_projector.parameters(), (weight, bias), strict=True):
        p.copy_(value)
    own_weight, own_bias = (p.detach() for p in objective.projector.parameters())
    queue, oldest = list(objective.queue.rows.clone()), 0
    for step in range(3):
        tokens, batch = harness.make_inputs(objective.needs, images=3, seed=step)
        queries = F.normalize(tokens[objective.query].cls.detach()[:3] @ own_weight.T + own_bias, dim=1)
        keys = F.normalize(tokens[objective.key].cls[3:] @ weight.T + bias, dim=1)
        logs = objective.loss(tokens, batch, harness.now(step))
        assert logs["loss"].item() == pytest.approx(by_hand(queries, keys, queue, 0.07), rel=1e-12)
        assert logs["similarity"].item() == pytest.approx(float((queries * keys).sum(1).mean()), rel=1e-12)
        for key in keys:  # after the loss: a queue that is filled first makes each positive a negative as well
            queue[oldest % 5] = key
            oldest += 1
    torch.testing.assert_close(objective.queue.rows, torch.stack(queue))


def test_loss_and_gradient_equal_lightlys_for_three_steps() -> None:
    ntxent = pytest.importorskip("lightly.loss").NTXentLoss
    theirs = ntxent(temperature=0.2, memory_bank_size=(6, 8)).double()
    theirs.memory_bank.bank.copy_(rows_of(6, seed=9))
    queue = rows_of(6, seed=9)
    for step in range(3):
        query, key = rows_of(3, seed=step).requires_grad_(), rows_of(3, seed=10 + step)
        ours, other = queue_nce(query, key, queue, 0.2), theirs(query, key.clone().requires_grad_())
        torch.testing.assert_close(ours, other)
        mine, lightlys = (torch.autograd.grad(loss, query)[0] for loss in (ours, other))
        tangential = mine - (mine * query).sum(1, keepdim=True) * query  # theirs normalises once more
        torch.testing.assert_close(tangential, lightlys)
        queue = queue.index_copy(0, torch.arange(3) + 3 * (step % 2), key)


def test_queue_is_read_before_the_keys_of_the_step_join_it() -> None:
    objective = harness.build("moco_v1", {**SMALL, "queue": 4, "temperature": 0.01})
    assert isinstance(objective, MoCoV1)
    tokens, batch = harness.make_inputs(objective.needs)
    with torch.no_grad():
        tokens[objective.query].cls[:4] = tokens[objective.key].cls[4:]  # query i equals key i: the loss can be 0
    first, again = (objective.loss(tokens, batch, harness.now())["loss"].item() for _ in range(2))
    assert first < 1e-3
    assert again == pytest.approx(math.log(2), abs=0.05)  # the same keys a second time: each has a twin in the queue


def test_every_slot_is_overwritten_after_a_round() -> None:
    objective = harness.build("moco_v1", SMALL)
    assert isinstance(objective, MoCoV1)
    before = objective.queue.rows.clone()
    harness.train(objective, steps=2, images=3)
    assert not (objective.queue.rows == before).any() and int(objective.queue.pointer) == 1
    assert {"queue.rows", "queue.pointer", "queue.filled"} <= objective.state_dict().keys()


def test_no_gradient_reaches_keys_or_queue() -> None:
    query, key, queue = (rows_of(n, seed=n).requires_grad_() for n in (3, 3, 5))
    queue_nce(query, key[:3], queue, 0.1).backward()
    assert query.grad is not None and key.grad is None and queue.grad is None


def test_a_single_embedding_gets_the_loss_called_chance() -> None:
    ones = torch.full((3, 4), 0.5, dtype=torch.float64)
    assert queue_nce(ones, ones, ones.repeat(5, 1), 0.07).item() == pytest.approx(math.log(16), rel=1e-12)
    objective = harness.build("moco_v1", {**SMALL, "queue": 15})
    logs = objective.loss(*harness.make_inputs(objective.needs), harness.now())
    assert logs["chance"].item() == pytest.approx(math.log(16))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("moco_v1", CASES[case], SPEC)


def test_state_round_trip() -> None:
    harness.check_state("moco_v1", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("moco_v1", CASES, SPEC)  # losses, gradients, and the queue on both ranks


def test_half_precision() -> None:
    harness.check_half_precision("moco_v1", SMALL)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("moco_v1", {"dim": 8, "queue": 8, "temperature": 0.5})
    assert losses[-1] < losses[1] - 0.1  # not to 0: the queue holds each image's earlier key as a negative


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("moco_v1", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_a_key_view_spares_the_crops_that_are_not_read() -> None:
    assert harness.build("moco_v1", CASES["a view for keys"], SPEC).needs == (
        Forward("student", "plain"),
        Forward("teacher", "other"),
    )


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="moco_v1 compares the two crops of a view, but 'plain' has 1"):
        harness.build("moco_v1", {"view": "plain"})
    with pytest.raises(ValueError, match="one crop of view 'global' with one of 'plain', but they have 2 and 1"):
        harness.build("moco_v1", {"key_view": "plain"})


@pytest.mark.parametrize("changed", [{"temperature": 0.3}, {"dim": 12}, {"queue": 7}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("moco_v1", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
