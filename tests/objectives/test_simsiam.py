from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.prediction import simsiam_loss, spread
from hybrid_ssl.objectives.simsiam import SimSiam
from hybrid_ssl.optim import OptimizerSettings, build_optimizer, param_groups, set_step
from tests.objectives import harness

SMALL = {"dim": 16, "bottleneck": 8}


def draw(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def cosine(a: Tensor, b: Tensor) -> float:
    rows = zip(a, b, strict=True)
    return sum(float(x @ y / (x @ x).sqrt() / (y @ y).sqrt()) for x, y in rows) / len(a)


def norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


def test_objective_equals_the_formula() -> None:
    objective = harness.build("simsiam", SMALL)
    assert isinstance(objective, SimSiam)
    tokens, batch = harness.make_inputs(objective.needs, images=6)
    w1, _, _, w2, _, _, w3 = (p.detach() for p in objective.projector.parameters())
    v1, gamma, beta, v2, bias = (p.detach() for p in objective.predictor.parameters())
    for p in (gamma, beta, bias):
        p.uniform_(0.5, 1.5)
    z, p = [], []
    for crop in tokens[objective.crops].cls.detach().chunk(2):
        z.append(norm(norm(norm(crop @ w1.T).relu() @ w2.T).relu() @ w3.T))  # the last one belongs to z
        p.append((norm(z[-1] @ v1.T) * gamma + beta).relu() @ v2.T + bias)
    expected = -(cosine(p[0], z[1]) + cosine(p[1], z[0])) / 2
    assert objective.loss(tokens, batch, harness.now())["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_loss_and_gradient_equal_lightlys_and_stop_at_the_embeddings() -> None:
    negative_cosine = pytest.importorskip("lightly.loss").NegativeCosineSimilarity()
    p1, p2, z1, z2 = (x.requires_grad_() for x in draw(4))
    ours = simsiam_loss((p1, p2), (z1, z2))
    other = (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach())) / 2
    torch.testing.assert_close(ours, other)
    mine, lightlys = (torch.autograd.grad(loss, (p1, p2), retain_graph=True) for loss in (ours, other))
    torch.testing.assert_close(mine, lightlys)
    ours.backward()
    assert z1.grad is None and z2.grad is None


def test_gradient_stops_at_the_embeddings_of_the_objective() -> None:
    objective = harness.build("simsiam", SMALL)
    assert isinstance(objective, SimSiam)
    tokens, batch = harness.make_inputs(objective.needs)
    with torch.no_grad():
        objective.predictor[3].weight.zero_()  # predictions no longer depend on the crop
        objective.predictor[3].bias.fill_(1.0)
    objective.loss(tokens, batch, harness.now())["loss"].backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in objective.projector.parameters())


def test_predictor_keeps_its_learning_rate_while_the_others_falls() -> None:
    rates = {}
    for constant in (True, False):
        objective = harness.build("simsiam", {**SMALL, "constant_predictor_lr": constant})
        assert isinstance(objective, SimSiam)
        cfg = OptimizerSettings(name="sgd", lr=0.05, lr_per=None)
        groups = param_groups(cfg, objective.named_parameters(), list(objective.param_rules()))
        optimizer = build_optimizer(cfg, groups)
        set_step(cfg, optimizer, 0.05, replace(harness.now(), step=99))
        of = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        assert all(lr < 1e-4 for name, lr in of.items() if name.startswith("projector"))
        rates[constant] = {lr for name, lr in of.items() if name.startswith("predictor")}
    assert rates[True] == {0.05} and max(rates[False]) < 1e-4


def test_spread_is_one_for_random_embeddings_and_zero_after_collapse() -> None:
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    assert spread(5 * rows).item() == pytest.approx(1, abs=0.02)
    assert spread(rows[:1].repeat(8, 1)).item() == pytest.approx(0, abs=1e-6)


def test_every_parameter_gets_a_gradient() -> None:
    harness.check_gradients("simsiam", SMALL)


def test_state_round_trip() -> None:
    harness.check_state("simsiam", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("simsiam", {"two crops": SMALL})


def test_half_precision() -> None:
    harness.check_half_precision("simsiam", SMALL, rtol=0.1)  # a mean of cosines near 0


def test_overfits_eight_images() -> None:
    losses = harness.overfit("simsiam", SMALL)
    assert losses[0] > -0.3 and losses[-1] < -0.9


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("simsiam", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


def test_bad_views_are_named() -> None:
    with pytest.raises(ValueError, match="simsiam compares the two crops of a view, but 'plain' has 1"):
        harness.build("simsiam", {"view": "plain"})


@pytest.mark.parametrize("changed", [{"dim": 20}, {"bottleneck": 12}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("simsiam", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
