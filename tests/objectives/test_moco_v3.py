import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.objectives.moco_v3 import MoCoV3
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"hidden": 16, "dim": 8}
CASES = {"whole": SMALL, "dropped": {**SMALL, "mask": "random", "drop": True}}


def by_hand(head: list[Tensor], x: list[list[float]]) -> Tensor:
    """Linear, BatchNorm, ReLU, ..., Linear, BatchNorm, written out; `head` is the list of matrices."""
    rows = torch.tensor(x, dtype=torch.float64)
    for depth, matrix in enumerate(head):
        rows = torch.stack([torch.stack([(row * weights).sum() for weights in matrix]) for row in rows])
        mean = sum(rows) / len(rows)
        var = sum((row - mean) ** 2 for row in rows) / len(rows)
        rows = (rows - mean) / (var + 1e-5).sqrt()
        if depth < len(head) - 1:
            rows = rows.clamp(min=0)
    return rows


def contrast_by_hand(queries: Tensor, keys: Tensor, tau: float) -> float:
    def cosine(a: Tensor, b: Tensor) -> float:
        return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())

    total = 0.0
    for i, query in enumerate(queries):
        exps = [math.exp(cosine(query, key) / tau) for key in keys]
        total -= math.log(exps[i] / sum(exps))
    return 2 * tau * total / len(queries)


def matrices(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters() if p.ndim == 2]


def test_loss_equals_the_formula() -> None:
    objective = harness.build("moco_v3", SMALL)
    assert isinstance(objective, MoCoV3)
    for module in (objective.projector, objective.predictor, objective.teacher_projector):
        for p in module.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p)  # also makes teacher and student differ
    tokens, batch = harness.make_inputs(objective.needs, images=5)
    online = [*matrices(objective.projector)]
    predictor = matrices(objective.predictor)
    queries, keys = [], []
    for crop in (slice(0, 5), slice(5, 10)):
        projected = by_hand(online, tokens[objective.query].cls[crop].tolist())
        queries.append(by_hand(predictor, projected.tolist()))
        keys.append(by_hand(matrices(objective.teacher_projector), tokens[objective.key].cls[crop].tolist()))
    expected = contrast_by_hand(queries[0], keys[1], 0.2) + contrast_by_hand(queries[1], keys[0], 0.2)
    loss = objective.loss(tokens, batch, harness.now())["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_loss_of_random_heads_is_near_four_tau_log_of_the_batch() -> None:
    objective = harness.build("moco_v3", {"hidden": 64, "dim": 256})
    loss = objective.loss(*harness.make_inputs(objective.needs, images=256), harness.now())["loss"]
    assert loss.item() == pytest.approx(4 * 0.2 * math.log(256) + 4 * 0.2 / (2 * 256 * 0.2**2), rel=0.03)


def test_queries_of_a_mask_are_maes_pass() -> None:
    objective = harness.build("moco_v3", CASES["dropped"])
    assert objective.needs == (Forward("student", "global", "random", drop=True), Forward("teacher", "global"))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("moco_v3", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("moco_v3", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("moco_v3", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("moco_v3", SMALL)


def test_other_widths_of_encoders() -> None:
    harness.check_gradients("moco_v3", SMALL, replace(harness.SPEC, dim=48, family="swin"))


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="'local' has 3: set views.local.crops to 2"):
        harness.build("moco_v3", {"view": "local"})
    with pytest.raises(ValueError, match="no view 'globl'.*global, local, plain"):
        harness.build("moco_v3", {"view": "globl"})
    with pytest.raises(ValueError, match="drop: true needs a mask"):
        harness.build("moco_v3", {"drop": True})


@pytest.mark.parametrize("changed", [{"temperature": 0.3}, {"hidden": 20}, {"dim": 12}])
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("moco_v3", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
