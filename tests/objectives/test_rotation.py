import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from hybrid_ssl.data.settings import ViewSettings
from hybrid_ssl.encoder import EncoderSettings, build_encoder
from hybrid_ssl.objectives.rotation import Rotation
from hybrid_ssl.plan import Batch, Tokens
from tests.objectives import harness

SPEC = replace(harness.SPEC, grids={"turned": (4, 4)}, crops={"turned": 4})
CASES: Mapping[str, harness.Settings] = {"four": {}}
SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 2}


def rotation() -> Rotation:
    objective = harness.build("rotation", {}, SPEC)
    assert isinstance(objective, Rotation)
    return objective


def test_loss_equals_the_formula() -> None:
    objective = rotation()
    tokens, batch = harness.make_inputs(objective.needs, images=3, spec=SPEC)
    logits = tokens[objective.turned].cls.detach() @ objective.head.weight.detach().T + objective.head.bias.detach()
    expected, right = 0.0, 0
    for row in range(12):  # view-major: three images of each turn
        turn = row // 3
        exps = [math.exp(x) for x in logits[row].tolist()]
        expected -= math.log(exps[turn] / sum(exps)) / 12
        right += exps[turn] == max(exps)
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert logs["accuracy"].item() == pytest.approx(right / 12)


def test_every_parameter_gets_a_gradient() -> None:
    harness.check_gradients("rotation", {}, SPEC)


def test_state_round_trip() -> None:
    harness.check_state("rotation", {}, SPEC)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("rotation", CASES, SPEC)


def test_half_precision() -> None:
    harness.check_half_precision("rotation", {}, spec=SPEC)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_overfits_eight_images(name: str, args: dict[str, object]) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(name=name, args=args), in_chans=3, sizes={"turned": (64, 64)})
    objective = Rotation(Rotation.Config(name="rotation"), encoder.spec({"turned": (64, 64)}, {"turned": 4}))
    upright = torch.randn(8, 3, 64, 64) + torch.linspace(-2, 2, 64)[:, None]  # darker at the top
    batch = Batch({"turned": torch.cat([upright.rot90(k, (2, 3)) for k in range(4)])}, {})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=2e-3)
    for _ in range(30):
        logs = objective.loss({objective.turned: encoder(batch.views["turned"])}, batch, harness.now())
        optimizer.zero_grad()
        logs["loss"].backward()
        optimizer.step()
    assert logs["accuracy"] == 1 and logs["loss"] < 0.2


def test_guessing_costs_the_logarithm_of_the_number_of_turns() -> None:
    objective = rotation()
    nn.init.zeros_(objective.head.weight)
    nn.init.zeros_(objective.head.bias)
    loss = objective.loss(*harness.make_inputs(objective.needs, spec=SPEC), harness.now())["loss"]
    assert loss.item() == pytest.approx(math.log(4))


def test_patches_and_other_passes_do_not_matter() -> None:
    objective = rotation()
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    other = Tokens(tokens[objective.turned].cls, torch.zeros(1))
    first, second = (
        objective.loss({objective.turned: t}, batch, harness.now())["loss"] for t in (tokens[objective.turned], other)
    )
    assert torch.equal(first, second)


def test_views_that_are_not_turned_are_refused() -> None:
    plain = replace(SPEC, made={"turned": ViewSettings(crops=4).made})
    with pytest.raises(ValueError, match="set views.turned.turns=true"):
        harness.build("rotation", {}, plain)
    harness.build("rotation", {}, replace(SPEC, made={"turned": ViewSettings(crops=4, turns=True).made}))
    with pytest.raises(ValueError, match="'turned' has 1 crops"):
        harness.build("rotation", {}, replace(SPEC, crops={"turned": 1}))
