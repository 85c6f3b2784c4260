import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.contrast import nt_xent
from hybrid_ssl.objectives.simclr import SimCLR
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"hidden": 16, "dim": 8}
CASES = {"two layers": SMALL, "three layers": {**SMALL, "layers": 3}}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(rows: list[Tensor], tau: float) -> float:
    """Mean over all rows of -log softmax at the other view; rows i and i + N are one image."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())

    total, half = 0.0, len(rows) // 2
    for i, row in enumerate(rows):
        exps = [math.exp(cosine(row, other) / tau) for j, other in enumerate(rows) if j != i]
        total -= math.log(math.exp(cosine(row, rows[(i + half) % len(rows)]) / tau) / sum(exps))
    return total / len(rows)


def test_loss_equals_a_double_loop() -> None:
    first, second = draw(5, 7, seed=1), draw(5, 7, seed=2)
    expected = by_hand([*first, *second], 0.3)
    assert nt_xent(first, second, 0.3).item() == pytest.approx(expected, rel=1e-12)


def test_objective_compares_what_its_head_makes_of_all_crops_together() -> None:
    objective = harness.build("simclr", SMALL)
    assert isinstance(objective, SimCLR)
    tokens, batch = harness.make_inputs(objective.needs, images=5)
    w1, gamma1, beta1, w2, gamma2 = (p.detach() for p in objective.projector.parameters())
    for p in (gamma1, beta1, gamma2):
        p.uniform_(0.5, 2.0)

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()  # over both views

    rows = norm((norm(tokens[objective.crops].cls @ w1.T) * gamma1 + beta1).relu() @ w2.T) * gamma2
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(by_hand(list(rows.detach()), 0.1), rel=1e-12)
    assert logs["chance"].item() == pytest.approx(math.log(9))


def test_loss_and_gradient_equal_lightlys() -> None:
    theirs = pytest.importorskip("lightly.loss").NTXentLoss(temperature=0.2)
    views = [draw(6, 8, seed=s).requires_grad_() for s in (1, 2)]
    ours, other = nt_xent(views[0], views[1], 0.2), theirs(views[0], views[1])
    torch.testing.assert_close(ours, other)
    for a, b in zip(torch.autograd.grad(ours, views), torch.autograd.grad(other, views), strict=True):
        torch.testing.assert_close(a, b)


def test_positive_stays_in_the_denominator() -> None:
    row = draw(1, 4)
    assert nt_xent(row, row, 0.1).item() == pytest.approx(0.0, abs=1e-12)  # the only other row; DCL would be log(0)
    pair = torch.eye(2, dtype=torch.float64)
    assert nt_xent(pair, pair, 1.0).item() == pytest.approx(math.log((math.e + 2) / math.e), rel=1e-12)


def test_a_single_embedding_gets_the_loss_called_chance() -> None:
    rows = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent(rows, rows, 0.1).item() == pytest.approx(math.log(11), rel=1e-12)


def test_large_cosines_do_not_overflow_in_fp16() -> None:
    first, second = draw(4, 8, seed=1), draw(4, 8, seed=2)
    with torch.autocast("cpu", torch.float16):
        loss = nt_xent(first.half(), second.half(), 0.01)
    torch.testing.assert_close(loss, nt_xent(first, second, 0.01).float(), rtol=0.02, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("simclr", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("simclr", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("simclr", CASES)  # fails when the gather drops gradients, or labels lack the rank's offset


def test_half_precision() -> None:
    harness.check_half_precision("simclr", SMALL)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("simclr", SMALL)
    assert losses[-1] < 0.05 * losses[0]


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("simclr", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_asks_for_one_pass_over_two_crops() -> None:
    assert harness.build("simclr", SMALL).needs == (Forward("student", "global"),)
    with pytest.raises(ValueError, match="simclr compares the two crops of a view, but 'local' has 3: set views.local"):
        harness.build("simclr", {"view": "local"})


@pytest.mark.parametrize("changed", [{"temperature": 0.3}, {"hidden": 20}, {"dim": 12}, {"layers": 3}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("simclr", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
