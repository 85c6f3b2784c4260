import math
from dataclasses import replace

import pytest
import torch
from timm.models import VisionTransformer
from torch import nn

from hybrid_ssl.encoder import EncoderSettings, build_encoder, wrap
from hybrid_ssl.objectives.jigsaw import Jigsaw
from hybrid_ssl.plan import Batch, Forward
from hybrid_ssl.pretrainer import Pretrainer
from tests.objectives import harness

CASES: dict[str, harness.Settings] = {"all": {"mask": None}, "dropped": {"mask": "random", "hidden": 20}}


def build(case: str) -> Jigsaw:
    objective = harness.build("jigsaw", CASES[case])
    assert isinstance(objective, Jigsaw)
    return objective


@pytest.mark.parametrize("case", CASES)
def test_loss_equals_the_formula(case: str) -> None:
    objective = build(case)
    tokens, batch = harness.make_inputs(objective.needs, images=3)
    patches, total, right, count = tokens[objective.pieces].patches.detach(), 0.0, 0, 0
    for image in range(3):
        hidden = batch.masks["random"][image].tolist() if case == "dropped" else [False] * 16
        places = [place for place in range(16) if not hidden[place]]
        for patch, place in zip(patches[image], places, strict=True):
            logits = objective.head(patch.unsqueeze(0))[0].tolist()
            total -= math.log(math.exp(logits[place]) / sum(map(math.exp, logits)))
            right, count = right + (max(logits) == logits[place]), count + 1
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"].item() == pytest.approx(total / count, rel=1e-12)
    assert logs["accuracy"].item() == pytest.approx(right / count)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("jigsaw", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("jigsaw", CASES["dropped"])


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("jigsaw", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("jigsaw", CASES["dropped"])


def small_vit(**args: object) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(32, 8, num_classes=0, embed_dim=48, depth=2, num_heads=2, **args)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [None, 4])
def test_without_positions_shuffled_patches_give_shuffled_tokens(kept: int | None) -> None:
    """The claim behind the objective: no order can leak, so nothing needs to be shuffled."""
    encoder = wrap(small_vit(reg_tokens=2)).double()
    nn.init.normal_(encoder.model.pos_embed)
    images, order = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randperm(16)
    tiles = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # [2, 3, 16, 8, 8]
    mosaic = tiles[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)
    mask = None if kept is None else torch.rand(2, 16).argsort(1) >= kept
    moved = None if mask is None else mask[:, order]
    first = encoder(images, mask, visible=kept, positions=False)
    second = encoder(mosaic, moved, visible=kept, positions=False)
    torch.testing.assert_close(first.cls, second.cls)
    if kept is None:
        torch.testing.assert_close(first.patches[:, order], second.patches)
    torch.testing.assert_close(first.patches.sum(1), second.patches.sum(1))
    assert not torch.allclose(encoder(images).cls, encoder(mosaic).cls)  # with positions they differ


def test_class_token_keeps_its_position() -> None:
    encoder = wrap(small_vit()).double()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = encoder(images, positions=False).cls
    with torch.no_grad():
        encoder.model.pos_embed[:, 1:] += 1
    assert torch.equal(encoder(images, positions=False).cls, before)
    with torch.no_grad():
        encoder.model.pos_embed[:, 0, ::2] += 1
    assert not torch.allclose(encoder(images, positions=False).cls, before)


def test_overfits_eight_images() -> None:
    encoder = wrap(small_vit())
    objective = Jigsaw(Jigsaw.Config(name="jigsaw"), encoder.spec({"plain": (32, 32)}, {"plain": 1}))
    mask = torch.stack([torch.randperm(16) >= 8 for _ in range(8)])
    batch = Batch({"plain": torch.randn(8, 3, 32, 32)}, {"random": mask})
    optimizer = torch.optim.AdamW([*encoder.parameters(), *objective.parameters()], lr=2e-3)
    for _ in range(80):
        tokens = {objective.pieces: encoder(batch.views["plain"], mask, visible=8, positions=False)}
        logs = objective.loss(tokens, batch, harness.now())
        optimizer.zero_grad()
        logs["loss"].backward()
        optimizer.step()
    assert logs["accuracy"] > 0.95 and logs["loss"] < 0.3
    assert not [n for n, p in encoder.named_parameters() if p.grad is None], "DDP would wait for these"


def test_encoders_with_built_in_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="a swin encoder cannot do without"):
        harness.build("jigsaw", {}, replace(harness.SPEC, family="swin"))
    args = {"embed_dim": 48, "depth": 1, "num_heads": 2, "patch_size": 8}
    rotary = build_encoder(
        EncoderSettings(name="eva02_tiny_patch14_224", args=args), in_chans=3, sizes={"plain": (32, 32)}
    )
    spec = rotary.spec({"plain": (32, 32)}, {"plain": 1})
    objective = Jigsaw(Jigsaw.Config(name="jigsaw"), spec)
    half = [0.5] * 3
    with pytest.raises(ValueError, match="'student plain, random dropped, no positions': Eva has its positions inside"):
        Pretrainer(
            rotary, {"jigsaw": objective}, {"jigsaw": 1.0}, spec=spec, visible={"random": 8}, mean=half, std=half
        )


def test_pass_is_another_than_one_with_positions() -> None:
    objective = build("dropped")
    assert objective.pieces != Forward("student", "plain", "random", drop=True)


@pytest.mark.parametrize("changed", [{"hidden": 24}, {"mask": None}, {"view": "local"}])
def test_every_setting_changes_the_loss(changed: dict[str, object]) -> None:
    losses = []
    for settings in (CASES["dropped"], {**CASES["dropped"], **changed}):
        objective = harness.build("jigsaw", settings)
        losses.append(objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].item())
    assert losses[0] != losses[1]
