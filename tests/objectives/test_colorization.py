import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hybrid_ssl.data.settings import ViewSettings
from hybrid_ssl.data.views import Views
from hybrid_ssl.encoder import EncoderSettings, build_encoder
from hybrid_ssl.nn.lab import srgb_to_lab
from hybrid_ssl.objectives.colorization import Colorization, rebalanced
from hybrid_ssl.plan import Batch
from tests.objectives import harness

SPEC = replace(
    harness.SPEC,
    grids={"gray": (4, 4), "color": (4, 4)},
    crops={"gray": 1, "color": 1},
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3),
)
CASES: dict[str, harness.Settings] = {"classes": {"cells": 2}, "regression": {"kind": "regression", "cells": 4}}


def build(case: str = "classes", **changed: object) -> Colorization:
    objective = harness.build("colorization", {**CASES[case], **changed}, SPEC)
    assert isinstance(objective, Colorization)
    return objective


def mean_ab(batch: Batch, image: int, top: int, left: int, side: int) -> tuple[float, float]:
    """a and b of one cell, pixel by pixel, from the normalised picture."""
    total = [0.0, 0.0]
    for y in range(top, top + side):
        for x in range(left, left + side):
            rgb = [float(batch.views["color"][image, c, y, x]) * SPEC.std[c] + SPEC.mean[c] for c in range(3)]
            lab = srgb_to_lab(torch.tensor(rgb, dtype=torch.float64).clamp(0, 1).view(3, 1, 1)).flatten()
            total = [total[k] + float(lab[k + 1]) / side**2 for k in range(2)]
    return total[0], total[1]


def test_loss_equals_the_formula() -> None:
    objective = build()
    objective.prior.copy_(torch.rand(313).double().softmax(0) ** 2).div_(objective.prior.sum())
    tokens, batch = harness.make_inputs(objective.needs, images=2, spec=SPEC)
    bins, p = objective.bins.tolist(), objective.prior.clone()

    smooth = [0.0] * 313
    for i, here in enumerate(bins):
        spread = [math.exp(-(math.dist(here, there) ** 2) / 50) for there in bins]
        smooth = [s + float(p[i]) * w / sum(spread) for s, w in zip(smooth, spread, strict=True)]
    weights = [1 / (0.5 * s + 0.5 / 313) for s in smooth]
    scale = sum(s * w for s, w in zip(smooth, weights, strict=True))

    total, right = 0.0, 0
    for image in range(2):
        for token in range(16):
            logits = objective.head(tokens[objective.gray].patches[image, token]).view(4, 313).tolist()
            for cell in range(4):
                top, left = token // 4 * 8 + cell // 2 * 4, token % 4 * 8 + cell % 2 * 4
                colour = mean_ab(batch, image, top, left, 4)
                order = sorted(range(313), key=lambda q: math.dist(colour, bins[q]))[:5]  # noqa: B023
                mass = [math.exp(-(math.dist(colour, bins[q]) ** 2) / 50) for q in order]
                lse = math.log(sum(map(math.exp, logits[cell])))
                entropy = sum(m / sum(mass) * (lse - logits[cell][q]) for q, m in zip(order, mass, strict=True))
                total += weights[order[0]] / scale * entropy / (2 * 16 * 4)
                right += max(logits[cell]) == logits[cell][order[0]]
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(total, rel=1e-6)
    assert logs["accuracy"].item() == pytest.approx(right / 128)


def test_regression_is_smooth_l1_of_scaled_colours() -> None:
    objective = build("regression", cells=1)
    tokens, batch = harness.make_inputs(objective.needs, images=2, spec=SPEC)
    total = baseline = 0.0
    for image in range(2):
        for token in range(16):
            predicted = objective.head(tokens[objective.gray].patches[image, token]).tolist()
            for guess, true in zip(predicted, mean_ab(batch, image, token // 4 * 8, token % 4 * 8, 8), strict=True):
                for value, kind in ((guess - true / 110, "loss"), (true / 110, "baseline")):
                    term = (0.5 * value**2 if abs(value) < 1 else abs(value) - 0.5) / 64
                    total, baseline = (total + term, baseline) if kind == "loss" else (total, baseline + term)
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(total, rel=1e-6)
    assert logs["baseline"].item() == pytest.approx(baseline, rel=1e-6)  # mean and std are float32


def test_rare_colours_weigh_more_and_the_mean_weight_is_one() -> None:
    objective = build()
    gray = (objective.bins == 0).all(1)
    prior = torch.where(gray, 0.9, 0.1 / 312).double()
    weight = rebalanced(prior, objective.bins, 0.5)
    assert weight[gray] < 0.2 * weight.median() and weight.max() / weight.min() < 313
    torch.testing.assert_close(rebalanced(prior, objective.bins, 1.0), torch.ones(313).double())


def test_prior_follows_the_colours_that_were_seen() -> None:
    objective = build(prior_momentum=0.5)
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    gray = batch._replace(
        views={**batch.views, "color": (0.5 - objective.mean) / objective.std + 0 * batch.views["color"]}
    )
    first = objective.loss(tokens, gray, harness.now())["loss"]
    at_zero = objective.prior[(objective.bins == 0).all(1)]
    assert at_zero.item() == pytest.approx(0.5 + 0.5 / 313, rel=1e-6) and objective.prior.sum().item() == pytest.approx(
        1
    )
    assert objective.loss(tokens, gray, harness.now())["loss"] < first  # gray weighs less now


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("colorization", CASES[case], SPEC)


def test_state_round_trip() -> None:
    harness.check_state("colorization", CASES["classes"], SPEC)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("colorization", CASES, SPEC)


def test_half_precision() -> None:
    harness.check_half_precision("colorization", CASES["classes"], spec=SPEC)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "patch_size": 8}),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 2},
        ),
    ],
)
def test_overfits_eight_images(name: str, args: dict[str, object]) -> None:
    torch.manual_seed(0)
    sizes, crops = {"gray": (32, 32), "color": (32, 32)}, {"gray": 1, "color": 1}
    encoder = build_encoder(EncoderSettings(name=name, args=args), in_chans=3, sizes=sizes)
    objective = Colorization(Colorization.Config(name="colorization", cells=1), encoder.spec(sizes, crops))
    color = torch.rand(8, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    gray = (color * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    batch = Batch({"color": color, "gray": gray}, {})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=5e-3)
    losses = []
    for _ in range(60):
        logs = objective.loss({objective.gray: encoder(gray)}, batch, harness.now())
        optimizer.zero_grad()
        logs["loss"].backward()
        optimizer.step()
        losses.append(logs["loss"].item())
    assert losses[-1] < 0.6 * losses[0]  # soft targets keep their entropy


def test_gray_view_shows_the_crops_of_the_colour_view() -> None:
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    views = Views({"color": ViewSettings(size=32), "gray": ViewSettings(size=32, like="color", gray=1.0)})(
        picture, 0, 0, 1
    )
    gray, color = views["gray"][0].float(), views["color"][0].float()
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    assert (gray[0] - luma).abs().max() <= 0.51


def test_guessing_costs_the_logarithm_of_the_number_of_bins() -> None:
    objective = build(rebalance=1.0)
    nn.init.zeros_(objective.head.weight)
    nn.init.zeros_(objective.head.bias)
    loss = objective.loss(*harness.make_inputs(objective.needs, spec=SPEC), harness.now())["loss"]
    assert loss.item() == pytest.approx(math.log(313))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"in_chans": 1}, {}, "needs colours: set data.channels=3, which is 1"),
        ({"family": "pooled"}, {}, "use a timm ViT or Swin"),
        ({}, {"cells": 3}, "3 cells do not divide a patch of 8 pixels"),
        ({"made": {"gray": ViewSettings(gray=0.2).made}}, {}, "set views.gray.gray=1.0"),
        ({"made": {"gray": ViewSettings(gray=1.0, like="plain").made}}, {}, "set views.gray.like=color"),
        ({"crops": {"gray": 1}}, {}, "there is no view 'color'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.build("colorization", settings, replace(SPEC, **change))  # type: ignore[arg-type]
    harness.build("colorization", {}, replace(SPEC, made={"gray": ViewSettings(gray=1.0, like="color").made}))


@pytest.mark.parametrize("changed", [{"kind": "regression"}, {"cells": 1}, {"rebalance": 0.9}, {"prior_momentum": 0.5}])
def test_every_setting_changes_the_loss(changed: dict[str, object]) -> None:
    losses = []
    for settings in (CASES["classes"], {**CASES["classes"], **changed}):
        objective = harness.build("colorization", settings, SPEC)
        for seed in range(2):  # the prior counts from the second step on
            logs = objective.loss(*harness.make_inputs(objective.needs, seed=seed, spec=SPEC), harness.now())
        losses.append(logs["loss"].item())
    assert losses[0] != losses[1]
