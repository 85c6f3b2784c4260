from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hybrid_ssl.nn.contrast import queue_nce
from hybrid_ssl.objectives.moco_v2 import MoCoV2
from tests.objectives import harness

SMALL = {"dim": 8, "hidden": 16, "queue": 6}


def test_loss_is_v1s_on_a_two_layer_head_without_batchnorm() -> None:
    objective = harness.build("moco_v2", SMALL)
    assert isinstance(objective, MoCoV2)
    tokens, batch = harness.make_inputs(objective.needs, images=3)
    w1, b1, w2, b2 = (p.detach() for p in objective.projector.parameters())
    query, key = (
        F.normalize((tokens[need].cls[rows].detach() @ w1.T + b1).relu() @ w2.T + b2, dim=1)
        for need, rows in ((objective.query, slice(3)), (objective.key, slice(3, 6)))
    )
    expected = queue_nce(query, key, objective.queue.read(), 0.2)
    torch.testing.assert_close(objective.loss(tokens, batch, harness.now())["loss"], expected)


def test_hidden_layer_is_as_wide_as_the_encoder() -> None:
    objective = harness.build("moco_v2", {"queue": 6})
    assert [tuple(p.shape) for p in objective.parameters() if p.requires_grad and p.ndim == 2] == [(32, 32), (128, 32)]


def test_every_parameter_gets_a_gradient() -> None:
    harness.check_gradients("moco_v2", SMALL)


def test_state_round_trip() -> None:
    harness.check_state("moco_v2", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("moco_v2", {"two crops": SMALL})


def test_half_precision() -> None:
    harness.check_half_precision("moco_v2", SMALL)


def test_overfits_eight_images() -> None:
    losses = harness.overfit("moco_v2", {**SMALL, "queue": 8, "temperature": 0.5})
    assert losses[-1] < losses[1] - 0.5  # not to 0: the queue holds each image's earlier key as a negative


def test_swins_pooled_feature_will_do() -> None:
    harness.check_gradients("moco_v2", SMALL, replace(harness.SPEC, dim=48, stride=32, family="swin"))


@pytest.mark.parametrize("changed", [{"temperature": 0.3}, {"dim": 12}, {"queue": 7}, {"hidden": 20}], ids=str)
def test_every_setting_changes_the_loss(changed: dict[str, float]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("moco_v2", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
