import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.contrast import nt_xent, supcon, unit
from hybrid_ssl.objectives.supcon import SupCon
from tests.objectives import harness

SMALL = {"hidden": 16, "dim": 8}
CASES = {"out": SMALL, "in": {**SMALL, "form": "in"}, "three crops": {**SMALL, "view": "local"}}
FORMS = ("out", "in")
LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 0, 1])  # class 2 has one image only


def draw_rows(rows: int = 8, dim: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return unit(torch.randn(rows, dim, generator=draw, dtype=torch.float64))


def by_hand(rows: Tensor, labels: Tensor, tau: float, form: str) -> float:
    total = 0.0
    for i, row in enumerate(rows):
        exps = {a: math.exp(float(row @ other) / tau) for a, other in enumerate(rows) if a != i}
        shares = [exps[a] / sum(exps.values()) for a in exps if labels[a] == labels[i]]
        if shares and form == "out":
            total -= sum(math.log(share) for share in shares) / len(shares)
        elif shares:
            total -= math.log(sum(shares) / len(shares))
    return total / len(rows)


@pytest.mark.parametrize("form", FORMS)
def test_loss_equals_a_double_loop(form: str) -> None:
    rows = draw_rows()
    assert supcon(rows, LABELS, 0.2, form).item() == pytest.approx(by_hand(rows, LABELS, 0.2, form), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_with_image_numbers_as_labels_it_is_simclrs_loss(form: str) -> None:
    rows = draw_rows().requires_grad_()
    ours, other = supcon(rows, torch.arange(4).repeat(2), 0.2, form), nt_xent(*rows.chunk(2), 0.2)
    torch.testing.assert_close(ours, other)
    mine, simclrs = (torch.autograd.grad(loss, rows)[0] for loss in (ours, other))
    tangential = mine - (mine * rows).sum(1, keepdim=True) * rows  # SimCLR's normalises: no radial part
    torch.testing.assert_close(tangential, simclrs)


@pytest.mark.parametrize("form", FORMS)
def test_one_positive_and_one_negative_give_a_smooth_triplet_loss(form: str) -> None:
    tau = 0.3
    rows = draw_rows(3)
    anchor, positive, negative = rows
    margin = ((anchor - positive).square().sum() - (anchor - negative).square().sum()) / (2 * tau)
    other = ((anchor - positive).square().sum() - (positive - negative).square().sum()) / (2 * tau)
    expected = (F.softplus(margin) + F.softplus(other)) / 3  # both rows of the pair are anchors, the third counts 0
    torch.testing.assert_close(supcon(rows, torch.tensor([0, 0, 1]), tau, form), expected)


def test_in_is_never_more_than_out_and_pulls_near_positives_more() -> None:
    rows = unit(torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double())
    rows.requires_grad_()
    labels = torch.tensor([0, 0, 0, 1])  # of row 0's positives, row 1 is near and row 2 far
    out, inside = (supcon(rows, labels, 0.2, form) for form in FORMS)
    assert inside < out
    pulls = {}
    for form, loss in (("out", out), ("in", inside)):
        (grad,) = torch.autograd.grad(loss, rows)
        pulls[form] = -grad[0] @ rows.detach()[2]
    assert pulls["out"] > 2 * pulls["in"] > 0  # a "SupCon" that sums inside the logarithm has the gradient of `in`


@pytest.mark.parametrize("form", FORMS)
def test_a_class_of_one_counts_nothing_and_breaks_nothing(form: str) -> None:
    rows = draw_rows(3).requires_grad_()
    loss = supcon(rows, torch.arange(3), 0.1, form)
    loss.backward()
    assert loss == 0 and rows.grad is not None and not rows.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_single_embedding_gets_the_loss_called_chance(form: str) -> None:
    objective = harness.build("supcon", {**SMALL, "form": form})
    tokens, batch = harness.make_inputs(objective.needs)
    with torch.no_grad():
        for both in tokens.values():
            both.cls.copy_(both.cls[:1].expand_as(both.cls))
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(logs["chance"].item()) == pytest.approx(math.log(7))


def test_objective_gives_both_crops_the_images_label() -> None:
    objective = harness.build("supcon", SMALL)
    assert isinstance(objective, SupCon)
    tokens, batch = harness.make_inputs(objective.needs, images=5)
    w1, b1, w2, b2 = (p.detach() for p in objective.projector.parameters())
    rows = (tokens[objective.crops].cls @ w1.T + b1).relu() @ w2.T + b2
    assert batch.labels is not None
    labels = torch.cat((batch.labels, batch.labels))
    expected = by_hand(unit(rows.detach()), labels, 0.1, "out")
    assert objective.loss(tokens, batch, harness.now())["loss"].item() == pytest.approx(expected, rel=1e-12)


def test_missing_labels_are_named() -> None:
    objective = harness.build("supcon", SMALL)
    tokens, batch = harness.make_inputs(objective.needs)
    with pytest.raises(ValueError, match="no labels: use class folders or name a column with data.label; simclr"):
        objective.loss(tokens, batch._replace(labels=None), harness.now())


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("supcon", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("supcon", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("supcon", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("supcon", SMALL)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("supcon", SMALL)  # positives of 3 classes share the softmax: the floor is about log 4
    assert losses[-1] < 0.4 * losses[0]


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("supcon", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


@pytest.mark.parametrize("changed", [{"temperature": 0.3}, {"hidden": 20}, {"dim": 12}, {"form": "in"}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, object]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("supcon", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
