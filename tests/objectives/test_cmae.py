import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hybrid_ssl.assemble import build_pretrainer, lay_out
from hybrid_ssl.config import read_recipe
from hybrid_ssl.data.masks import hidden_count
from hybrid_ssl.nn.decoder import Decoder
from hybrid_ssl.objectives.cmae import CMAE
from hybrid_ssl.plan import Forward, Tokens, hidden_columns, visible_rows
from tests.objectives import harness

RECIPE = Path(__file__).parents[2] / "recipes" / "cmae_vitb.yaml"
SPEC = replace(harness.SPEC, grids={"online": (4, 4), "target": (4, 4)}, crops={"online": 1, "target": 1})
SMALL = {
    "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "feature_depth": 2, "hidden": 24, "dim": 8,
}  # fmt: skip
CASES: dict[str, harness.Settings] = {"small": SMALL, "raw": {**SMALL, "norm_pixels": False, "temperature": 0.5}}


def build(**changed: object) -> CMAE:
    objective = harness.build("cmae", {**SMALL, **changed}, SPEC)
    assert isinstance(objective, CMAE)
    for name, parameter in objective.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.4)  # also makes teacher and student differ
        assert "teacher" in name or parameter.requires_grad
    return objective


def decode_all(decoder: Decoder, seen: Tokens, mask: Tensor) -> Tensor:
    """The decoder without its short cuts: tokens in the order of the picture, predictions everywhere: [B, N, L]."""
    known = decoder.embed(torch.cat([seen.cls[:, None], seen.patches], 1))
    full = decoder.mask_token.expand(len(mask), mask.shape[1], -1).clone()
    for image, hidden in enumerate(mask):
        full[image, ~hidden] = known[image, 1:]
    x = torch.cat([known[:, :1], full], 1) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    return decoder.pred(decoder.norm(x))[:, 1:]


def mlp(head: nn.Module, x: Tensor) -> Tensor:
    """Linear, BatchNorm with eps 1e-6, ReLU, Linear."""
    first, second = (p for p in head.parameters() if p.ndim == 2)
    x = x @ first.T
    return ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()).clamp(min=0) @ second.T


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def test_contrast_equals_the_formula() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, images=5, spec=SPEC)
    mask = batch.masks["units"]
    feature = decode_all(objective.feature_decoder, tokens[objective.visible], mask).mean(1)
    queries = unit(mlp(objective.predictor, mlp(objective.projector, feature)))
    keys = unit(mlp(objective.teacher_projector, tokens[objective.target].layers[-1].mean(1)))
    expected = 0.0
    for i in range(5):
        exps = [math.exp(float(queries[i].detach() @ keys[j]) / 0.07) for j in range(5)]
        expected -= 2 * 0.07 * math.log(exps[i] / sum(exps)) / 5
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["contrast"].item() == pytest.approx(expected, rel=1e-10)
    assert logs["loss"].item() == pytest.approx(logs["pixels"].item() + expected, rel=1e-10)
    assert logs["similarity"].item() == pytest.approx((queries * keys).sum(1).mean().item(), rel=1e-10)


def test_pixel_part_is_mae() -> None:
    objective = build()
    mae = harness.build("mae", {"view": "online", "mask": "units", **{k: SMALL[k] for k in list(SMALL)[:3]}}, SPEC)
    mae.load_state_dict({k: v for k, v in objective.state_dict().items() if k.startswith("decoder.")})
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    assert objective.loss(tokens, batch, harness.now())["pixels"] == mae.loss(tokens, batch, harness.now())["loss"]
    assert objective.visible == Forward("student", "online", "units", drop=True)
    without = build(contrast_weight=0.0).loss(tokens, batch, harness.now())
    assert without["loss"] == without["pixels"]


def test_mean_of_the_decoder_counts_visible_and_hidden_patches() -> None:
    torch.manual_seed(0)
    decoder = Decoder(12, (3, 4), 7, dim=16, depth=2, heads=2).double()
    mask = torch.stack([torch.randperm(12) >= 5 for _ in range(3)])
    seen = Tokens(torch.randn(3, 12).double(), torch.randn(3, 5, 12).double())
    found = decoder.mean(*seen[:2], visible_rows(mask, 5), hidden_columns(mask, 7))
    every = decode_all(decoder, seen, mask)
    torch.testing.assert_close(found, every.mean(1))
    assert not torch.allclose(found, every[mask].unflatten(0, (3, 7)).mean(1))  # not the hidden ones alone


def test_target_is_the_mean_of_all_patches_before_the_last_norm() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, spec=SPEC)
    target = tokens[objective.target]
    first = objective.loss(tokens, batch, harness.now())["contrast"]
    normed = {**tokens, objective.target: target._replace(cls=target.cls + 1, patches=target.patches * 2)}
    assert torch.equal(objective.loss(normed, batch, harness.now())["contrast"], first)
    order = torch.randperm(16)
    moved = {**tokens, objective.target: target._replace(layers=(target.layers[-1][:, order],))}
    torch.testing.assert_close(objective.loss(moved, batch, harness.now())["contrast"], first)


def test_recipe_shows_68_patches_in_units_of_four_and_moves_the_teacher_evenly() -> None:
    """A popular library hides 75 % in single patches, compares with a negative cosine, and crops two views."""
    recipe = read_recipe(RECIPE)
    assert hidden_count(recipe.masks["units"], (14, 14), 16) == 128
    assert (
        recipe.views["target"].like == "online" and recipe.views["online"].shift == recipe.views["target"].shift == 32
    )
    assert recipe.views["online"].jitter is None and recipe.teacher.momentum == 0.996
    assert recipe.objectives["cmae"].temperature == 0.07


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("cmae", CASES[case], SPEC)


def test_state_round_trip() -> None:
    harness.check_state("cmae", SMALL, SPEC)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("cmae", CASES, SPEC)


def test_half_precision() -> None:
    harness.check_half_precision("cmae", CASES["raw"], spec=SPEC)


def test_overfits_eight_images() -> None:
    objective = build(decoder_dim=32, temperature=0.5)
    inputs, batch = harness.make_inputs(objective.needs, images=8, spec=SPEC)
    cls, patches = (nn.Parameter(x.detach()) for x in inputs[objective.visible][:2])
    tokens = {**inputs, objective.visible: Tokens(cls, patches)}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad] + [cls, patches], lr=1e-2)
    first = objective.loss(tokens, batch, harness.now())
    for _ in range(150):
        logs = objective.loss(tokens, batch, harness.now())
        optimizer.zero_grad()
        logs["loss"].backward()
        optimizer.step()
    assert logs["pixels"] < 0.5 * first["pixels"] and logs["contrast"] < 0.6 * first["contrast"]
    assert logs["similarity"] > 0.8


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="'target' has 2 crops: set views.target.crops to 1"):
        harness.build("cmae", SMALL, replace(SPEC, crops={"online": 1, "target": 2}))
    swin = read_recipe(
        RECIPE, ["encoder.name=swin_tiny_patch4_window7_224", "encoder.position=timm", "encoder.scheme=timm"]
    )
    half = [0.5] * 3
    with pytest.raises(ValueError, match="SwinTransformer needs every patch in its windows"):
        build_pretrainer(swin, half, half, layout=lay_out(swin, world=1))


CHANGED = [
    {"decoder_dim": 32}, {"decoder_depth": 2}, {"decoder_heads": 4}, {"mlp_ratio": 2.0}, {"feature_depth": 1},
    {"hidden": 16}, {"dim": 4}, {"temperature": 0.2}, {"contrast_weight": 0.5}, {"norm_pixels": False},
]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGED)
def test_every_setting_changes_the_loss(changed: dict[str, object]) -> None:
    losses = []
    for settings in (SMALL, {**SMALL, **changed}):
        objective = harness.build("cmae", settings, SPEC)
        losses.append(objective.loss(*harness.make_inputs(objective.needs, spec=SPEC), harness.now())["loss"].item())
    assert losses[0] != losses[1]
