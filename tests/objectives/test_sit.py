import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from hybrid_ssl.data.settings import CorruptSettings, ViewSettings
from hybrid_ssl.encoder import EncoderSettings, build_encoder
from hybrid_ssl.objectives.sit import PixelDecoder, SiT
from hybrid_ssl.plan import Batch
from tests.objectives import harness

MADE = ViewSettings(crops=2, like="global", corrupt=CorruptSettings()).made
SPEC = replace(
    harness.SPEC,
    grids={"global": (4, 4), "corrupted": (4, 4)},
    crops={"global": 2, "corrupted": 2},
    made={"corrupted": MADE},
)
SMALL = {"hidden": 16, "dim": 8}
CASES: dict[str, harness.Settings] = {"one": SMALL, "five": {**SMALL, "reconstruction_weight": 5.0}}


def build(**changed: object) -> SiT:
    objective = harness.build("sit", {**SMALL, **changed}, SPEC)
    assert isinstance(objective, SiT)
    for parameter in objective.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)  # also makes teacher and student differ
    return objective


def project(head: nn.Module, x: Tensor) -> Tensor:
    """Three matrices, each with BatchNorm; ReLU, then GELU; unit length."""
    for depth, matrix in enumerate(p.detach() for p in head.parameters() if p.ndim == 2):
        x = x @ matrix.T
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
        x = (x.clamp(min=0), gelu(x), x)[depth]
    return x / x.square().sum(1, keepdim=True).sqrt()


def test_loss_equals_the_formula() -> None:
    objective = build(reconstruction_weight=5.0)
    tokens, batch = harness.make_inputs(objective.needs, images=4, spec=SPEC)
    seen, clean = tokens[objective.corrupted], tokens[objective.clean]
    contrast = 0.0
    for mine, other in ((0, 4), (4, 0)):  # the key of the other crop, among keys of that crop alone
        queries = project(objective.head, seen.cls.detach()[mine : mine + 4])
        keys = project(objective.teacher_head, clean.cls[other : other + 4])
        for i in range(4):
            exps = [math.exp(float(queries[i] @ key) / 0.2) for key in keys]
            contrast -= 2 * 0.2 * math.log(exps[i] / sum(exps)) / 4

    x = seen.patches.detach()
    given = {name: parameter.detach() for name, parameter in objective.decoder.named_parameters()}
    for depth in range(3):
        x = gelu(x @ given[f"layers.{depth}.weight"].T + given[f"layers.{depth}.bias"])
    pixels, count = 0.0, 0
    where = batch.masks["corrupted.pixels"].unflatten(1, (32, 32))
    for row, image in enumerate(batch.views["global"]):
        for token in range(16):
            top, left = token // 4 * 8, token % 4 * 8
            patch = torch.einsum("d,dcpq->cpq", x[row, token], given["out.weight"])
            patch = patch + given["out.bias"][:, None, None]
            here = where[row, top : top + 8, left : left + 8]
            off = (patch - image[:, top : top + 8, left : left + 8]).abs()
            pixels, count = pixels + float((off * here).sum()), count + 3 * int(here.sum())
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["contrast"].item() == pytest.approx(contrast, rel=1e-10)
    assert logs["pixels"].item() == pytest.approx(pixels / count, rel=1e-10)
    assert logs["loss"].item() == pytest.approx(contrast + 5 * pixels / count, rel=1e-10)


def test_clean_pixels_and_the_student_s_colours_do_not_matter_to_the_reconstruction() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    first = objective.loss(tokens, batch, harness.now())["pixels"]
    where = batch.masks["corrupted.pixels"].view(8, 1, 32, 32)
    clean = batch.views["global"]
    for changed, same in ((clean + ~where, True), (clean + where, False)):
        other = batch._replace(views={**batch.views, "global": changed})
        assert torch.equal(objective.loss(tokens, other, harness.now())["pixels"], first) == same


def test_corrupted_pixels_that_are_right_by_chance_count() -> None:
    """The mask says what was corrupted; comparing pictures would forget equal pixels and shrink the denominator."""
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    equal = batch._replace(views={**batch.views, "corrupted": batch.views["global"]})
    first, second = (objective.loss(tokens, each, harness.now()) for each in (batch, equal))
    assert torch.equal(first["pixels"], second["pixels"]) and second["baseline"] == 0 < first["baseline"]


def test_teacher_needs_no_decoder() -> None:
    pairs = list(build().ema_pairs())
    assert len(pairs) == 1 and not any(isinstance(m, PixelDecoder) for pair in pairs for m in pair)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("sit", CASES[case], SPEC)


def test_state_round_trip() -> None:
    harness.check_state("sit", SMALL, SPEC)


def test_two_ranks_equal_one() -> None:
    """Also where the processes have different numbers of corrupted pixels."""
    harness.check_two_ranks("sit", CASES, SPEC)


def test_half_precision() -> None:
    harness.check_half_precision("sit", SMALL, spec=SPEC)


@pytest.mark.parametrize(
    ("steps", "name", "args"),
    [
        (40, "vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "patch_size": 8}),
        (
            15,  # slower on a CPU
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "window_size": 2},
        ),
    ],
)
def test_overfits_eight_images(steps: int, name: str, args: dict[str, object]) -> None:
    torch.manual_seed(0)
    sizes = {"global": (64, 64), "corrupted": (64, 64)}
    encoder = build_encoder(EncoderSettings(name=name, args=args), in_chans=3, sizes=sizes)
    objective = SiT(SiT.Config(name="sit", **SMALL), encoder.spec(sizes, {"global": 2, "corrupted": 2}))  # type: ignore[arg-type]
    clean = torch.randn(8, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3).repeat(2, 1, 1, 1)
    where = torch.rand(16, 1, 64, 64) < 0.4
    views = {"global": clean, "corrupted": torch.where(where, torch.zeros(()), clean)}
    batch = Batch(views, {"corrupted.pixels": where.flatten(1)})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=3e-3)
    for _ in range(steps):
        with torch.no_grad():
            keys = encoder(clean)
        logs = objective.loss(
            {objective.corrupted: encoder(views["corrupted"]), objective.clean: keys}, batch, harness.now()
        )
        optimizer.zero_grad()
        logs["loss"].backward()
        optimizer.step()
    assert logs["contrast"] < (0.3 if steps > 15 else 0.8) * 4 * 0.2 * math.log(8)
    assert logs["pixels"] < (0.85 if steps > 15 else 1.0) * logs["baseline"]


def test_views_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="set views.corrupted.corrupt={}"):
        harness.build("sit", SMALL, replace(SPEC, made={"corrupted": ViewSettings(crops=2).made}))
    other = ViewSettings(crops=2, like="plain", corrupt=CorruptSettings()).made
    with pytest.raises(ValueError, match="has to be made with like=global: set views.corrupted.like=global"):
        harness.build("sit", SMALL, replace(SPEC, made={"corrupted": other}))
    with pytest.raises(ValueError, match="'global' has 3: set views.global.crops to 2"):
        harness.build("sit", SMALL, replace(SPEC, crops={"global": 3, "corrupted": 2}))
    with pytest.raises(ValueError, match="sit rebuilds pixels from patch tokens: use a timm ViT or Swin"):
        harness.build("sit", SMALL, replace(SPEC, family="pooled"))


@pytest.mark.parametrize("changed", [{"hidden": 24}, {"dim": 4}, {"temperature": 0.5}, {"reconstruction_weight": 2.0}])
def test_every_setting_changes_the_loss(changed: dict[str, object]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("sit", settings, SPEC)
        losses.append(objective.loss(*harness.make_inputs(objective.needs, spec=SPEC), harness.now())["loss"].item())
    assert losses[0] != losses[1]
