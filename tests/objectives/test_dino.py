import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.objectives.dino import DINO
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"out_dim": 24, "hidden": 16, "bottleneck": 8}
CASES = {
    "multi-crop": SMALL,
    "global only": {**SMALL, "local_view": None},
    "masked, free lengths": {**SMALL, "mask": "block", "norm_last_layer": False},
    "BatchNorm": {**SMALL, "batchnorm": True},
}


def vary(objective: torch.nn.Module) -> None:
    """Weights large enough to matter; the teacher's differ from the student's."""
    torch.manual_seed(3)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.4)


def head_by_hand(head: torch.nn.Module, row: Tensor) -> list[float]:
    """Logits of one row: linear, GELU, linear, GELU, linear, unit length, cosine with each prototype."""
    w1, b1, w2, b2, w3, b3, prototypes = (p.detach() for p in head.parameters())
    x = row
    for weight, bias in ((w1, b1), (w2, b2)):
        x = weight @ x + bias
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    x = w3 @ x + b3
    return [float((p * x).sum() / p.square().sum().sqrt() / x.square().sum().sqrt()) for p in prototypes]


def softmax_by_hand(logits: list[float], temperature: float) -> list[float]:
    exps = [math.exp(x / temperature) for x in logits]
    return [e / sum(exps) for e in exps]


def test_loss_and_center_equal_the_formula_for_two_steps() -> None:
    objective = harness.build("dino", {**SMALL, "teacher_temperature": 0.05})
    assert isinstance(objective, DINO) and objective.local is not None
    vary(objective)
    images, k = 3, SMALL["out_dim"]
    center = [0.0] * k
    for step in range(2):
        tokens, batch = harness.make_inputs(objective.needs, images, seed=step)
        targets = [head_by_hand(objective.teacher_head, row) for row in tokens[objective.target].cls.detach()]
        crops = torch.cat((tokens[objective.whole].cls, tokens[objective.local].cls)).detach()
        logits = [head_by_hand(objective.head, row) for row in crops]
        total, pairs = 0.0, set()
        for i, v, b in itertools.product(range(2), range(5), range(images)):
            if i == v:
                continue
            target = softmax_by_hand([t - c for t, c in zip(targets[i * images + b], center, strict=True)], 0.05)
            student = softmax_by_hand(logits[v * images + b], 0.1)
            total -= sum(t * math.log(s) for t, s in zip(target, student, strict=True)) / images
            pairs.add((i, v))
        loss = objective.loss(tokens, batch, harness.now(step))["loss"]
        assert loss.item() == pytest.approx(total / len(pairs), rel=1e-12) and len(pairs) == 2 * (3 + 1)
        mean = [sum(row[j] for row in targets) / len(targets) for j in range(k)]
        center = [0.9 * c + 0.1 * m for c, m in zip(center, mean, strict=True)]
        assert objective.center.value.tolist() == pytest.approx(center, rel=1e-12)


def test_loss_and_gradients_equal_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    theirs = lightly.DINOLoss(SMALL["out_dim"], teacher_temp=0.05, warmup_teacher_temp_epochs=0)
    objective = harness.build("dino", {**SMALL, "teacher_temperature": 0.05})
    assert isinstance(objective, DINO) and objective.local is not None
    vary(objective)
    weights = list(objective.head.parameters())
    for step in range(2):
        tokens, batch = harness.make_inputs(objective.needs, seed=step)
        with torch.no_grad():
            targets = objective.teacher_head(tokens[objective.target].cls).chunk(2)
        crops = torch.cat((tokens[objective.whole].cls, tokens[objective.local].cls))
        expected = theirs(list(targets), list(objective.head(crops).chunk(5)), teacher_temp=0.05)
        loss = objective.loss(tokens, batch, harness.now(step))["loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # their centre is float32
        for ours, other in zip(*(torch.autograd.grad(y, weights) for y in (loss, expected)), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-9)


def test_loss_of_a_fresh_head_is_near_log_k() -> None:
    objective = harness.build("dino", {**SMALL, "out_dim": 4096, "bottleneck": 256})
    logs = objective.loss(*harness.make_inputs(objective.needs), harness.now())
    assert logs["loss"].item() == pytest.approx(math.log(4096), rel=0.15)


def test_collapse_shows_in_the_metrics() -> None:
    objective = harness.build("dino", SMALL)
    assert isinstance(objective, DINO)
    tokens, batch = harness.make_inputs(objective.needs)
    vary(objective)
    healthy = objective.loss(tokens, batch, harness.now())
    assert healthy["teacher_spread"] > healthy["teacher_entropy"] + 0.1 and healthy["kl"] > 0
    objective.center.value.fill_(0)
    objective.center.value[3] = -10  # prototype 3 wins everywhere
    one_wins = objective.loss(tokens, batch, harness.now())
    assert one_wins["teacher_spread"] < 0.01 and one_wins["teacher_entropy"] < 0.01


def test_teacher_temperature_follows_its_ramp() -> None:
    ramp = {"start": 0.04, "end": 0.08, "over": "3 epochs", "per": "epoch"}
    for step, temperature in ((0, 0.04), (9, 0.04), (10, 0.06), (25, 0.08), (80, 0.08)):  # 10 steps an epoch
        losses = []
        for setting in (ramp, temperature):
            objective = harness.build("dino", {**SMALL, "teacher_temperature": setting})
            vary(objective)
            losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now(step))["loss"].item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-12), step


def test_prototypes_are_held_for_the_first_epoch() -> None:
    for free, count in ((False, 1), (True, 2)):
        objective = harness.build("dino", {**SMALL, "norm_last_layer": not free, "hold_last_layer": "3 epochs"})
        assert isinstance(objective, DINO)
        (rule,) = objective.param_rules()
        assert len(rule.params) == count and rule.params[0] is objective.head.prototypes.weight
        assert rule.hold == "3 epochs"


def test_masked_crops_are_ibots_pass() -> None:
    needs = harness.build("dino", {**SMALL, "mask": "block"}).needs
    assert needs == (
        Forward("student", "global", "block"),
        Forward("student", "local"),
        Forward("teacher", "global"),
    )


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("dino", CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    harness.check_state("dino", CASES[case])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("dino", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("dino", SMALL)


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("dino", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="a temperature must be above 0, got 0"):
        harness.build("dino", {"teacher_temperature": 0.0})
    with pytest.raises(ValueError, match="a temperature must be above 0, got -0.1"):
        harness.build("dino", {"teacher_temperature": {"start": 0.04, "end": -0.1}})
    with pytest.raises(ValueError, match="no view 'small'.*global, local, plain"):
        harness.build("dino", {"local_view": "small"})
    with pytest.raises(ValueError, match="one crop and there is no local view"):
        harness.build("dino", {"global_view": "plain", "local_view": None})


@pytest.mark.parametrize(
    "changed",
    [
        {"out_dim": 20},
        {"hidden": 20},
        {"bottleneck": 12},
        {"student_temperature": 0.2},
        {"teacher_temperature": 0.07},
        {"center_momentum": 0.5},
        {"batchnorm": True},
        {"local_view": None},
        {"norm_last_layer": False},
    ],
    ids=str,
)
def test_every_setting_changes_the_run(changed: dict[str, object]) -> None:
    results = [harness.train(harness.build("dino", settings), lr=1.0) for settings in (SMALL, {**SMALL, **changed})]
    assert results[0]["losses"] != results[1]["losses"]
