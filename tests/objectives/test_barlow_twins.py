from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.redundancy import barlow_twins_terms
from hybrid_ssl.objectives.barlow_twins import BarlowTwins
from tests.objectives import harness

WIDE = {"hidden": 16, "dim": 24}  # more than twice the rows: Gram matrices
CASES = {"Gram": WIDE, "direct": {"hidden": 16, "dim": 5}}


def draw_views(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    first = 2 + 3 * torch.randn(rows, dim, generator=draw, dtype=torch.float64)
    return first, first + torch.randn(rows, dim, generator=draw, dtype=torch.float64)


def by_hand(first: Tensor, second: Tensor) -> tuple[float, float]:
    """(on-diagonal, off-diagonal) of the correlation matrix, entry by entry."""
    rows, dim = first.shape

    def standardise(x: Tensor) -> Tensor:
        return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()

    on = off = 0.0
    for i in range(dim):
        for j in range(dim):
            entry = float((standardise(first[:, i]) * standardise(second[:, j])).sum() / rows)
            on, off = (on + (entry - 1) ** 2, off) if i == j else (on, off + entry**2)
    return on, off


@pytest.mark.parametrize("dim", [3, 11, 12, 30])
def test_terms_equal_the_matrix_written_out_in_both_forms(dim: int) -> None:
    first, second = draw_views(6, dim)
    assert tuple(map(float, barlow_twins_terms(first, second))) == pytest.approx(by_hand(first, second), rel=1e-9)


def test_both_forms_have_the_same_gradient() -> None:
    first, second = (view.requires_grad_() for view in draw_views(6, 30))
    terms = barlow_twins_terms(first, second)
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (first, second))
    matrix = a.T @ b / 6
    direct = matrix.square().sum() - matrix.diagonal().square().sum()
    ours, expected = (torch.autograd.grad(x, (first, second), retain_graph=True) for x in (terms.off_diagonal, direct))
    torch.testing.assert_close(ours, expected)


def test_loss_and_gradient_equal_lightlys() -> None:
    theirs = pytest.importorskip("lightly.loss").BarlowTwinsLoss(lambda_param=0.0051)
    first, second = (view.requires_grad_() for view in draw_views(6, 8))
    terms = barlow_twins_terms(first, second)
    ours, other = terms.on_diagonal + 0.0051 * terms.off_diagonal, theirs(first, second)
    torch.testing.assert_close(ours, other, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, first), torch.autograd.grad(other, first))


def test_equal_whitened_views_have_loss_zero_and_constant_ones_chance() -> None:
    basis = torch.linalg.qr(draw_views(9, 8)[0] - draw_views(9, 8)[0].mean(0)).Q[:, :4] * 3  # variance 1
    terms = barlow_twins_terms(basis, basis)
    assert terms.on_diagonal.item() == pytest.approx(0, abs=1e-8)
    assert terms.off_diagonal.item() == pytest.approx(0, abs=1e-8)
    terms = barlow_twins_terms(torch.ones(6, 24), torch.ones(6, 24))
    assert tuple(map(float, terms)) == (24, 0)
    objective = harness.build("barlow_twins", WIDE)
    assert objective.loss(*harness.make_inputs(objective.needs), harness.now())["chance"] == 24


def test_objective_equals_the_formula_with_batchnorm_for_each_crop() -> None:
    objective = harness.build("barlow_twins", WIDE)
    assert isinstance(objective, BarlowTwins)
    tokens, batch = harness.make_inputs(objective.needs, images=6)
    w1, _, _, w2, _, _, w3 = (p.detach() for p in objective.projector.parameters())

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    views = [
        norm(norm(crop @ w1.T).relu() @ w2.T).relu() @ w3.T for crop in tokens[objective.crops].cls.detach().chunk(2)
    ]
    on, off = by_hand(*views)
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(on + 0.0051 * off, rel=1e-9)
    assert (logs["on_diagonal"].item(), logs["off_diagonal"].item()) == pytest.approx((on, off), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("barlow_twins", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("barlow_twins", WIDE)


def test_two_ranks_equal_one() -> None:
    # fails when devices standardise by themselves, or when the sum over devices is outside the graph (gradient / W)
    harness.check_two_ranks("barlow_twins", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("barlow_twins", WIDE)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("barlow_twins", WIDE)  # 8 rows in 24 dimensions keep correlations: not to 0
    assert losses[-1] < 0.2 * losses[0]


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("barlow_twins", WIDE, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="barlow_twins compares the two crops of a view, but 'local' has 3"):
        harness.build("barlow_twins", {"view": "local"})


@pytest.mark.parametrize("changed", [{"off_diagonal": 0.1}, {"hidden": 20}, {"dim": 12}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (WIDE, {**WIDE, **changed}):
        objective = harness.build("barlow_twins", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
