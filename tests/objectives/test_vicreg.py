from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.redundancy import vicreg_terms
from hybrid_ssl.objectives.vicreg import VICReg
from tests.objectives import harness

WIDE = {"hidden": 16, "dim": 24}  # more dimensions than rows: Gram matrices
CASES = {"Gram": WIDE, "direct": {"hidden": 16, "dim": 3}}


def draw_views(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    first = 2 + torch.randn(rows, dim, generator=draw, dtype=torch.float64)
    return first, first + 0.5 * torch.randn(rows, dim, generator=draw, dtype=torch.float64)


def by_hand(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    rows, dim = first.shape
    invariance = sum((float(a) - float(b)) ** 2 for a, b in zip(first.flatten(), second.flatten(), strict=True))
    variance = covariance = 0.0
    for view in (first, second):
        for i in range(dim):
            for j in range(dim):
                a, b = view[:, i], view[:, j]
                entry = float(((a - a.mean()) * (b - b.mean())).sum() / (rows - 1))
                if i == j:
                    variance += max(0.0, 1 - (entry + 1e-4) ** 0.5) / dim / 2  # the mean over both views
                else:
                    covariance += entry**2 / dim
    return invariance / (rows * dim), variance, covariance


@pytest.mark.parametrize("dim", [3, 5, 6, 20])
def test_terms_equal_the_formula_in_both_forms(dim: int) -> None:
    first, second = draw_views(6, dim)
    assert tuple(map(float, vicreg_terms(first, second))) == pytest.approx(by_hand(first, second), rel=1e-9)


def test_both_forms_have_the_same_gradient() -> None:
    first, second = (view.requires_grad_() for view in draw_views(6, 20))
    ours = vicreg_terms(first, second).covariance
    expected = torch.zeros((), dtype=torch.float64)
    for view in (first, second):
        matrix = torch.cov(view.T)
        expected = expected + (matrix.square().sum() - matrix.diagonal().square().sum()) / 20
    torch.testing.assert_close(torch.autograd.grad(ours, first), torch.autograd.grad(expected, first))


def test_loss_and_gradient_equal_lightlys() -> None:
    theirs = pytest.importorskip("lightly.loss").VICRegLoss()
    first, second = (view.requires_grad_() for view in draw_views(6, 8))
    invariance, variance, covariance = vicreg_terms(first, second)
    ours, other = 25 * invariance + 25 * variance + covariance, theirs(first, second)
    torch.testing.assert_close(ours, other)
    torch.testing.assert_close(torch.autograd.grad(ours, first), torch.autograd.grad(other, first))


def test_constant_embeddings_have_variance_term_099_and_no_other() -> None:
    rows = torch.full((6, 20), 3.0).requires_grad_()  # without the half over views it would be 1.98
    terms = vicreg_terms(rows, rows)
    assert [term.item() for term in terms] == pytest.approx([0, 0.99, 0], abs=1e-6)
    terms.variance.backward()
    assert rows.grad is not None and rows.grad.isfinite().all()  # the 1e-4 stands inside the root
    objective = harness.build("vicreg", WIDE)
    logs = objective.loss(*harness.make_inputs(objective.needs), harness.now())
    assert logs["chance"].item() == pytest.approx(25 * 0.99)


def test_objective_weighs_the_terms_of_a_head_with_batchnorm_for_each_crop() -> None:
    objective = harness.build("vicreg", WIDE)
    assert isinstance(objective, VICReg)
    tokens, batch = harness.make_inputs(objective.needs, images=6)
    w1, b1, _, _, w2, b2, _, _, w3 = (p.detach() for p in objective.projector.parameters())

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()

    views = [
        norm(norm(crop @ w1.T + b1).relu() @ w2.T + b2).relu() @ w3.T
        for crop in tokens[objective.crops].cls.detach().chunk(2)
    ]
    invariance, variance, covariance = by_hand(*views)
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(25 * invariance + 25 * variance + covariance, rel=1e-9)
    assert logs["covariance"].item() == pytest.approx(covariance, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("vicreg", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("vicreg", WIDE)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("vicreg", CASES)  # fails when variance or covariance are those of one device


def test_half_precision() -> None:
    harness.check_half_precision("vicreg", WIDE)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("vicreg", WIDE)  # 8 rows in 24 dimensions keep covariances: not to 0
    assert losses[-1] < 0.4 * losses[0]


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("vicreg", WIDE, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="vicreg compares the two crops of a view, but 'local' has 3"):
        harness.build("vicreg", {"view": "local"})


@pytest.mark.parametrize(
    "changed",
    [{"invariance": 10.0}, {"variance": 10.0}, {"covariance": 2.0}, {"hidden": 20}, {"dim": 12}],
    ids=str,
)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (WIDE, {**WIDE, **changed}):
        objective = harness.build("vicreg", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
