from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.sigreg import random_directions, sigreg
from hybrid_ssl.objectives.lejepa import LeJEPA, invariance
from hybrid_ssl.plan import Forward
from tests.objectives import harness

SMALL = {"hidden": 16, "dim": 8, "slices": 32, "lam": 0.1}
CASES = {
    "global center": SMALL,
    "equal crops": {**SMALL, "local_view": None, "center": "all"},
    "sum, pooled": {**SMALL, "form": "sum", "pooled": True, "center": "all"},
    "masked": {**SMALL, "mask": "block"},
}


def build(settings: harness.Settings) -> LeJEPA:
    objective = harness.build("lejepa", settings)
    assert isinstance(objective, LeJEPA)
    return objective


def project(objective: LeJEPA, inputs: harness.Inputs) -> Tensor:
    """[V, B, d], computed apart from the objective: BatchNorm over all crops together."""
    x = torch.cat([inputs[0][need].cls for need in objective.needs])
    first, norm1, _, second, norm2, _, last = objective.projector
    for linear, norm in ((first, norm1), (second, norm2)):
        x = linear(x)
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        x = x.relu()
    return last(x).unflatten(0, (objective.crops, -1))


def expected(objective: LeJEPA, inputs: harness.Inputs, step: int) -> Tensor:
    cfg, z = objective.cfg, project(objective, inputs)
    inv = torch.stack([(view - z[: 2 if cfg.center == "global" else len(z)].mean(0)) ** 2 for view in z]).mean()
    a = random_directions(8, 32, 0, step, 0)
    samples = [z.flatten(0, 1)] if cfg.pooled else list(z)
    normality = torch.stack([sigreg(sample, a) for sample in samples]).mean()
    return (1.0 if cfg.form == "sum" else 0.9) * inv + 0.1 * normality


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_the_plain_form(case: str) -> None:
    objective = build(CASES[case])
    for step in range(2):
        tokens, _ = inputs = harness.make_inputs(objective.needs, seed=step)
        leaves = [*objective.parameters(), *(both.cls for both in tokens.values())]
        found = objective.loss(*inputs, harness.now(step))["loss"]
        plain = expected(objective, inputs, step)
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=0)
        for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-11)


def test_invariance_is_the_distance_to_the_mean_without_stop_gradient() -> None:
    z = torch.tensor([[[0.0]], [[2.0]], [[7.0]]], requires_grad=True)  # two global crops and a local one
    value = invariance(z, centers=2)
    torch.testing.assert_close(value, torch.tensor((1.0 + 1.0 + 36.0) / 3))
    torch.testing.assert_close(invariance(z, centers=3), torch.tensor((9.0 + 1.0 + 16.0) / 3))
    value.backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad.flatten(), torch.tensor([-8.0, -4.0, 12.0]) / 3)  # detached: -2, 2, 12


def test_every_crop_is_regularised_global_ones_too() -> None:
    """A popular library once left the global crops out of SIGReg."""
    objective = build({**SMALL, "lam": 1.0})
    inputs = harness.make_inputs(objective.needs)
    z = project(objective, inputs).detach().requires_grad_()
    a = random_directions(8, 32, 0, 0, 0)
    per_view = torch.stack([sigreg(view, a) for view in z])
    found = objective.loss(*inputs, harness.now())["sigreg"]
    torch.testing.assert_close(found, per_view.mean().detach(), rtol=1e-9, atol=0)
    assert len(per_view) == 5 and not torch.isclose(found, per_view[2:].mean().detach())


def test_directions_change_with_step_and_micro_batch() -> None:
    objective = build(SMALL)
    inputs = harness.make_inputs(objective.needs)
    when = [harness.now(0), harness.now(1), replace(harness.now(0), micro=1), replace(harness.now(0), seed=1)]
    values = [float(objective.loss(*inputs, now)["sigreg"]) for now in when]
    assert len(set(values)) == 4 and values[0] == float(objective.loss(*inputs, harness.now(0))["sigreg"])


def test_no_teacher_takes_part() -> None:
    objective = build(SMALL)
    assert objective.needs == (Forward("student", "global"), Forward("student", "local"))
    assert list(objective.ema_pairs()) == []


def test_training_lifts_features_that_are_not_normal() -> None:
    objective = build({**SMALL, "lam": 0.5})
    start, end = (harness.train(objective, steps=n, images=8, lr=0.05)["losses"][-1] for n in (1, 40))
    assert end < 0.8 * start


def test_overfits_eight_images() -> None:
    losses = harness.overfit("lejepa", SMALL)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("lejepa", CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_state_round_trip(case: str) -> None:
    harness.check_state("lejepa", CASES[case])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("lejepa", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("lejepa", SMALL)


def test_swin_works_alike() -> None:
    spec = replace(harness.SPEC, dim=48, stride=32, family="swin", grids={"global": (7, 6), "local": (3, 3)})
    harness.check_gradients("lejepa", SMALL, replace(spec, crops={"global": 2, "local": 3}))


def test_one_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="set views.plain.crops to 2 or more, or name a local_view"):
        build({**SMALL, "global_view": "plain", "local_view": None})


@pytest.mark.parametrize(
    "changed",
    [
        {"local_view": None},
        {"mask": "block"},
        {"lam": 0.2},
        {"form": "sum"},
        {"center": "all"},
        {"pooled": True},
        {"slices": 16},
        {"knots": 9},
        {"hidden": 20},
        {"dim": 12},
    ],
    ids=str,
)
def test_every_setting_changes_the_run(changed: dict[str, object]) -> None:
    results = [harness.train(build(settings)) for settings in (SMALL, {**SMALL, **changed})]
    assert results[0]["losses"] != results[1]["losses"]
