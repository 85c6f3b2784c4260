import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hybrid_ssl.data.settings import ViewSettings
from hybrid_ssl.data.views import Views
from hybrid_ssl.encoder import EncoderSettings, build_encoder
from hybrid_ssl.objectives.cutpaste import CutPaste
from hybrid_ssl.plan import Batch, EncoderSpec
from tests.objectives import harness


def with_crops(crops: int) -> EncoderSpec:
    return replace(harness.SPEC, grids={"pasted": (4, 4)}, crops={"pasted": crops})


SPEC = with_crops(3)
CASES: Mapping[str, harness.Settings] = {"default": {}, "narrow": {"hidden": 16, "bottleneck": 8}}
SWIN = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 2}


def normalise(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("crops", [2, 3])
def test_loss_equals_the_formula(crops: int) -> None:
    objective = harness.build("cutpaste", CASES["narrow"], with_crops(crops))
    assert isinstance(objective, CutPaste)
    tokens, batch = harness.make_inputs(objective.needs, images=4, spec=with_crops(crops))
    matrices = [p.detach() for p in objective.head.parameters() if p.ndim == 2]
    bias = list(objective.head.parameters())[-1].detach()
    x = tokens[objective.pasted].cls.detach()
    for matrix in matrices[:-1]:
        x = normalise(x @ matrix.T).clamp(min=0)
    logits = x @ matrices[-1].T + bias
    expected, right = 0.0, 0
    for row, each in enumerate(logits.tolist()):
        kind = row // 4  # view-major: four images of each kind
        expected -= math.log(math.exp(each[kind]) / sum(map(math.exp, each))) / len(logits)
        right += each[kind] == max(each)
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(expected, rel=1e-10)
    assert logs["accuracy"].item() == pytest.approx(right / len(logits))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("cutpaste", CASES[case], SPEC)


def test_state_round_trip() -> None:
    harness.check_state("cutpaste", CASES["narrow"], SPEC)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("cutpaste", CASES, SPEC)


def test_half_precision() -> None:
    harness.check_half_precision("cutpaste", CASES["narrow"], spec=SPEC)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_overfits_eight_images(name: str, args: dict[str, object]) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderSettings(name=name, args=args), in_chans=3, sizes={"pasted": (64, 64)})
    objective = CutPaste(CutPaste.Config(name="cutpaste"), encoder.spec({"pasted": (64, 64)}, {"pasted": 2}))
    views = Views({"pasted": ViewSettings(size=64, crops=2, cutpaste=["none", "patch"])})
    pictures = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    crops = torch.stack([views(each, 0, 0, i)["pasted"] for i, each in enumerate(pictures)], 1)  # [2, 8, C, H, W]
    batch = Batch({"pasted": (crops.flatten(0, 1).float() - 128) / 70}, {})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=2e-3)
    for _ in range(60):
        logs = objective.loss({objective.pasted: encoder(batch.views["pasted"])}, batch, harness.now())
        optimizer.zero_grad()
        logs["loss"].backward()
        optimizer.step()
    assert logs["accuracy"] == 1 and logs["loss"] < 0.2


def test_guessing_costs_the_logarithm_of_the_number_of_versions() -> None:
    objective = harness.build("cutpaste", {}, SPEC)
    last = [m for m in objective.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    loss = objective.loss(*harness.make_inputs(objective.needs, spec=SPEC), harness.now())["loss"]
    assert loss.item() == pytest.approx(math.log(3))


def test_views_without_defects_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set views.pasted.cutpaste=\[none,patch,scar\]"):
        harness.build("cutpaste", {}, replace(SPEC, made={"pasted": ViewSettings(crops=3).made}))
    made = ViewSettings(crops=3, cutpaste=["none", "patch", "scar"]).made
    harness.build("cutpaste", {}, replace(SPEC, made={"pasted": made}))
    with pytest.raises(ValueError, match="'pasted' has one crop: set 2 or 3"):
        harness.build("cutpaste", {}, with_crops(1))


@pytest.mark.parametrize("changed", [{"hidden": 24}, {"bottleneck": 12}])
def test_every_setting_changes_the_loss(changed: dict[str, object]) -> None:
    losses = []
    for settings in (CASES["narrow"], {**CASES["narrow"], **changed}):
        objective = harness.build("cutpaste", settings, SPEC)
        losses.append(objective.loss(*harness.make_inputs(objective.needs, spec=SPEC), harness.now())["loss"].item())
    assert losses[0] != losses[1]
