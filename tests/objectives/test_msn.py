import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.distributed import rank, world_size
from hybrid_ssl.nn.sinkhorn import sinkhorn
from hybrid_ssl.objectives.msn import MSN, sharpened_targets, unused_prototypes
from hybrid_ssl.plan import Forward
from tests.objectives import harness
from tests.objectives.harness import average
from tests.ranks import run_two_ranks

SMALL = {"target_view": "plain", "view": "plain", "focal_view": "local", "out_dim": 12, "hidden": 16, "dim": 8}
CASES = {
    "dropped": SMALL,
    "whole": {**SMALL, "mask": None, "memax_weight": 2.0},
    "large only": {**SMALL, "view": "global", "focal_view": None, "sinkhorn_iterations": 0},
}
LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def build(settings: harness.Settings) -> MSN:
    """Prototypes and biases large enough to matter; the teacher's weights differ from the student's."""
    objective = harness.build("msn", settings)
    assert isinstance(objective, MSN)
    torch.manual_seed(3)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return objective


def head(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Linear, BatchNorm over all rows, GELU; twice; linear; unit length."""
    layers = list(module.children())
    for linear, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
        x = linear(x)
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        x = F.gelu(x)
    return F.normalize(layers[6](x), dim=-1)


def published_targets(p: Tensor, iterations: int = 3) -> Tensor:
    """Sharpen, then Sinkhorn in the domain of probabilities, with the released constants."""
    p = p ** (1 / 0.25)
    p = p / p.sum(1, keepdim=True)
    if not iterations:
        return p
    q = p.T / p.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def published(objective: MSN, inputs: harness.Inputs) -> tuple[Tensor, Tensor]:
    tokens, _ = inputs
    q = F.normalize(objective.prototypes.weight, dim=-1)
    with torch.no_grad():
        p = (head(objective.teacher_head, tokens[objective.target].cls) @ q.T / 0.1).softmax(-1)
        target = published_targets(p, objective.cfg.sinkhorn_iterations)
    anchors = torch.cat([tokens[need].cls for need in objective.needs if need.net == "student"])
    p = (head(objective.head, anchors) @ q.T / 0.1).softmax(-1)
    match = -(target.repeat(len(p) // len(target), 1) * p.log()).sum(-1).mean()
    mean = p.mean(0)
    return match, math.log(len(mean)) + (mean * mean.log()).sum()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_published_form(case: str) -> None:
    objective = build(CASES[case])
    tokens, _ = inputs = harness.make_inputs(objective.needs, images=5)
    match, memax = published(objective, inputs)
    logs = objective.loss(*inputs, harness.now())
    torch.testing.assert_close([logs["match"], logs["memax"]], [match.detach(), memax.detach()])
    leaves = [p for p in objective.parameters() if p.requires_grad]
    leaves += [both.cls for need, both in tokens.items() if need.net == "student"]
    expected = match + objective.cfg.memax_weight * memax
    found, wanted = (torch.autograd.grad(value, leaves) for value in (logs["loss"], expected))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def test_loss_equals_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    objective = build(SMALL)
    tokens, batch = harness.make_inputs(objective.needs)
    anchors = objective.head(torch.cat([tokens[need].cls for need in objective.needs if need.net == "student"]))
    targets = objective.teacher_head(tokens[objective.target].cls)
    theirs = lightly.MSNLoss()(anchors, targets, objective.prototypes.weight)
    found = objective.loss(tokens, batch, harness.now())["loss"]
    torch.testing.assert_close(found, theirs)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("msn", {**SMALL, "mask": None})
    assert losses[-1] < 0.6 * losses[0]


def test_sharpening_comes_before_sinkhorn() -> None:
    """The reverse order, and Sinkhorn on logits without the softmax between, give other targets."""
    p = LOGITS.softmax(-1)
    found = sharpened_targets(LOGITS, 1.0, 0.25, 3)
    torch.testing.assert_close(found, published_targets(p))
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=torch.float64))
    balanced = published_targets(p**0.25)  # sharpening undone: Sinkhorn of p itself
    reverse = balanced**4 / (balanced**4).sum(1, keepdim=True)
    assert (found - reverse).abs().max() > 0.05
    assert (found - sinkhorn(LOGITS, 0.25)).abs().max() > 1e-3


def test_sharpening_alone_is_a_power() -> None:
    torch.testing.assert_close(
        sharpened_targets(LOGITS, 0.1, 0.25, 0), published_targets((LOGITS / 0.1).softmax(-1), iterations=0)
    )


def test_unused_prototypes_cost_up_to_ln_k() -> None:
    torch.testing.assert_close(unused_prototypes(torch.zeros(4, 6), 0.1), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(unused_prototypes(10 * torch.eye(6), 0.1), torch.tensor(0.0), rtol=0, atol=1e-6)
    one = torch.zeros(4, 6).index_fill(1, torch.tensor([2]), 10.0)
    torch.testing.assert_close(unused_prototypes(one, 0.1), torch.tensor(math.log(6)))


def test_loss_begins_near_ln_k_with_all_prototypes_in_use() -> None:
    objective = harness.build("msn", {**SMALL, "out_dim": 1024, "dim": 256, "sharpening": 1.0})
    logs = objective.loss(*harness.make_inputs(objective.needs, images=16), harness.now())
    assert abs(logs["match"] - math.log(1024)) < 0.4 and logs["memax"] < 0.2


def test_only_the_large_anchor_loses_patches() -> None:
    expected = (
        Forward("student", "plain", "dropped", drop=True),
        Forward("student", "local"),
        Forward("teacher", "plain"),
    )
    assert build(SMALL).needs == expected
    assert build(CASES["whole"]).needs[0] == Forward("student", "plain")


def test_targets_are_constants_also_for_the_prototypes() -> None:
    objective = build({**SMALL, "memax_weight": 0.0})
    tokens, batch = harness.make_inputs(objective.needs)
    match, _ = published(objective, (tokens, batch))
    objective.loss(tokens, batch, harness.now())["loss"].backward()
    (expected,) = torch.autograd.grad(match, objective.prototypes.weight)
    torch.testing.assert_close(objective.prototypes.weight.grad, expected, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in objective.teacher_head.parameters())


def test_prototypes_have_no_weight_decay() -> None:
    objective = build(SMALL)
    (rule,) = objective.param_rules()
    assert rule.weight_decay == 0.0 and list(rule.params) == [objective.prototypes.weight]


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("msn", CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    harness.check_state("msn", CASES[case])


def memax_of_own_rows() -> list[Tensor]:
    own = LOGITS.chunk(world_size())[rank()]
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    value = unused_prototypes(own @ weight, 1.0)
    value.backward()
    assert weight.grad is not None
    return [value.detach(), average(weight.grad)]


def both() -> dict[str, Any]:
    return {"memax": memax_of_own_rows(), "runs": harness.train_all("msn", CASES)}


def test_two_ranks_equal_one() -> None:
    """The mean over all processes' anchors with its gradient: a local one would be another number altogether."""
    alone = both()
    for result in run_two_ranks(both):
        torch.testing.assert_close(result, alone, rtol=1e-9, atol=1e-11)
    halves = torch.stack([unused_prototypes(half, 1.0) for half in LOGITS.chunk(2)]).mean()
    assert not torch.isclose(halves, alone["memax"][0])


def test_half_precision() -> None:
    harness.check_half_precision("msn", SMALL)


def test_swin_reads_whole_anchors() -> None:
    spec = replace(harness.SPEC, dim=48, stride=32, family="swin", grids={"plain": (7, 6), "local": (3, 3)})
    harness.check_gradients("msn", CASES["whole"], replace(spec, crops={"plain": 1, "local": 3}))


def test_two_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="one target an image, but view 'global' has 2 crops"):
        build({**SMALL, "target_view": "global"})


@pytest.mark.parametrize(
    "changed",
    [
        {"focal_view": None},
        {"view": "global"},
        {"mask": None},
        {"out_dim": 10},
        {"hidden": 20},
        {"dim": 12},
        {"temperature": 0.2},
        {"sharpening": 0.5},
        {"sinkhorn_iterations": 1},
        {"memax_weight": 0.5},
    ],
    ids=str,
)
def test_every_setting_changes_the_run(changed: dict[str, object]) -> None:
    results = [harness.train(harness.build("msn", settings)) for settings in (SMALL, {**SMALL, **changed})]
    assert results[0]["losses"] != results[1]["losses"]
