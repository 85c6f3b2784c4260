from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.prediction import byol_loss, simsiam_loss
from hybrid_ssl.objectives.byol import BYOL
from tests.objectives import harness

SMALL = {"hidden": 16, "dim": 8}


def draw(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def distance(prediction: Tensor, target: Tensor) -> float:
    """Mean squared distance of rows that were divided by their lengths."""
    p = torch.stack([row / row.square().sum().sqrt() for row in prediction])
    t = torch.stack([row / row.square().sum().sqrt() for row in target])
    return float((p - t).square().sum() / len(p))


def mlp_by_hand(head: torch.nn.Module, x: Tensor) -> Tensor:
    """Linear with bias, BatchNorm, ReLU, linear without bias."""
    w1, b1, gamma, beta, w2 = (p.detach() for p in head.parameters())
    x = x @ w1.T + b1
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * gamma + beta
    return x.relu() @ w2.T


def test_loss_is_the_sum_of_both_squared_distances() -> None:
    p1, p2, t1, t2 = draw(4, seed=0)
    loss = byol_loss((p1, p2), (t1, t2))
    assert loss.item() == pytest.approx(distance(p1, t2) + distance(p2, t1), rel=1e-12)
    assert byol_loss((p1, p2), (p2, p1)).item() == pytest.approx(0, abs=1e-12)
    assert byol_loss((p1, p2), (-p2, -p1)).item() == pytest.approx(8)


def test_objective_equals_the_formula_with_batchnorm_for_each_crop() -> None:
    objective = harness.build("byol", SMALL)
    assert isinstance(objective, BYOL)
    torch.manual_seed(3)
    for p in objective.parameters():
        torch.nn.init.normal_(p)
    tokens, batch = harness.make_inputs(objective.needs, images=5)
    predictions = [
        mlp_by_hand(objective.predictor, mlp_by_hand(objective.projector, x))
        for x in tokens[objective.online].cls.detach().chunk(2)
    ]
    targets = [mlp_by_hand(objective.teacher_projector, x) for x in tokens[objective.target].cls.chunk(2)]
    expected = distance(predictions[0], targets[1]) + distance(predictions[1], targets[0])
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_gradient_is_four_times_simsiams_and_none_reaches_targets() -> None:
    p1, p2, t1, t2 = (x.requires_grad_() for x in draw(4, seed=0))
    byol_loss((p1, p2), (t1, t2)).backward()
    (simsiams,) = torch.autograd.grad(simsiam_loss((p1, p2), (t1, t2)), p1)
    torch.testing.assert_close(p1.grad, 4 * simsiams)
    assert t1.grad is None and t2.grad is None


def test_loss_and_gradient_equal_lightlys() -> None:
    negative_cosine = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    p1, p2, t1, t2 = (x.requires_grad_() for x in draw(4, seed=0))
    ours = byol_loss((p1, p2), (t1, t2))
    other = 4 + 2 * (negative_cosine(p1, t2.detach()) + negative_cosine(p2, t1.detach()))
    torch.testing.assert_close(ours, other)
    torch.testing.assert_close(torch.autograd.grad(ours, p1), torch.autograd.grad(other, p1))


def test_large_embeddings_do_not_overflow_in_fp16() -> None:
    p1, p2, t1, t2 = (x.half() * 100 for x in draw(4, seed=0))  # squares beyond 65504
    expected = byol_loss((p1.double(), p2.double()), (t1.double(), t2.double()))
    torch.testing.assert_close(byol_loss((p1, p2), (t1, t2)).double(), expected, rtol=1e-3, atol=0)


def test_predictor_has_no_teacher() -> None:
    objective = harness.build("byol", SMALL)
    assert isinstance(objective, BYOL)
    assert list(objective.ema_pairs()) == [(objective.teacher_projector, objective.projector)]


def test_collapse_shows_in_the_spread_not_in_the_loss() -> None:
    objective = harness.build("byol", {**SMALL, "dim": 32})
    assert isinstance(objective, BYOL)
    inputs = harness.make_inputs(objective.needs, images=16)
    assert objective.loss(*inputs, harness.now())["spread"] > 0.5
    with torch.no_grad():
        for head in (objective.projector, objective.teacher_projector, objective.predictor):
            head[1].weight.fill_(1e-6)  # after the BatchNorm nothing of the image is left
            head[1].bias.fill_(1.0)
            head[3].weight.fill_(1.0)
    logs = objective.loss(*inputs, harness.now())
    assert logs["loss"] < 1e-3 and logs["spread"] < 1e-3


def test_every_parameter_gets_a_gradient() -> None:
    harness.check_gradients("byol", SMALL)


def test_state_round_trip() -> None:
    harness.check_state("byol", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("byol", {"two crops": SMALL})


def test_half_precision() -> None:
    harness.check_half_precision("byol", SMALL)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("byol", SMALL)
    assert losses[-1] < 0.05 * losses[0]


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("byol", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="byol compares the two crops of a view, but 'local' has 3"):
        harness.build("byol", {"view": "local"})


@pytest.mark.parametrize("changed", [{"hidden": 20}, {"dim": 12}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("byol", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
