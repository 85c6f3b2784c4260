import pytest
import torch
from timm.models import SwinTransformer, VisionTransformer
from torch import nn

from hybrid_ssl.encoder import wrap
from hybrid_ssl.nn.hog import hog
from hybrid_ssl.objectives.maskfeat import MaskFeat
from hybrid_ssl.plan import EncoderSpec, Forward, Tokens
from tests.objectives import harness

CASES = {"one cell a patch": {}, "four": {"cell": 4, "bins": 5}}


def build(settings: harness.Settings = CASES["four"], spec: EncoderSpec = harness.SPEC) -> MaskFeat:
    objective = harness.build("maskfeat", settings, spec)
    assert isinstance(objective, MaskFeat)
    return objective


def test_loss_is_the_mean_over_hidden_patches_computed_one_by_one() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs)
    cells = hog(batch.views["plain"], 4, 5)  # [B, 3, 5, 8, 8]
    terms = []
    for image, patch in batch.masks["block"].nonzero().tolist():
        y, x = patch // 4 * 2, patch % 4 * 2
        target = cells[image, :, :, y : y + 2, x : x + 2].flatten()
        predicted = objective.head(tokens[objective.masked].patches[image, patch])
        terms.append((predicted - target).square().mean())
    found = objective.loss(tokens, batch, harness.now())
    torch.testing.assert_close(found["loss"], torch.stack(terms).mean())
    found["loss"].backward()
    gradient = tokens[objective.masked].patches.grad
    assert gradient is not None and torch.equal(gradient.any(-1), batch.masks["block"])


def test_the_published_head_has_108_outputs() -> None:
    spec = EncoderSpec(dim=32, stride=16, grids={"plain": (14, 14)}, crops={"plain": 1})
    assert build({}, spec).head.out_features == 108
    assert build({}, EncoderSpec(dim=32, stride=32, grids={"plain": (7, 7)})).head.out_features == 432  # Swin


def test_targets_are_those_of_the_normalised_image() -> None:
    # the stable normalisation of each cell cancels the scale of a channel, never that of a sum of channels
    objective = build()
    _, batch = harness.make_inputs(objective.needs)
    scaled = batch._replace(views={"plain": batch.views["plain"] * 2})
    torch.testing.assert_close(objective.target(scaled), objective.target(batch))
    turned = batch._replace(views={"plain": batch.views["plain"].flip(1)})
    assert not torch.allclose(objective.target(turned), objective.target(batch))


def test_a_batch_with_nothing_hidden_has_loss_zero() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, masks={"block": torch.zeros(4, 16, dtype=torch.bool)})
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"] == 0 and logs["baseline"] == 0 and logs["loss"].requires_grad


@pytest.mark.parametrize(
    "model",
    [
        VisionTransformer(32, 8, num_classes=0, embed_dim=24, depth=1, num_heads=2),
        SwinTransformer(32, 2, num_classes=0, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 2), window_size=4),
    ],
)
def test_trains_the_mask_token_of_a_vit_and_of_a_swin(model: nn.Module) -> None:
    encoder = wrap(model)
    encoder.add_mask_token()
    encoder.double()
    objective = build(spec=encoder.spec({"plain": (32, 32)}, {"plain": 1}))
    _, batch = harness.make_inputs(objective.needs)
    tokens = encoder(batch.views["plain"], batch.masks["block"])
    assert tokens.patches.shape == (4, 16, encoder.model.num_features)
    objective.loss({objective.masked: tokens}, batch, harness.now())["loss"].backward()
    assert encoder.mask_token is not None and encoder.mask_token.grad is not None and encoder.mask_token.grad.any()


def test_asks_for_masked_patches_of_the_student() -> None:
    assert build().needs == (Forward("student", "plain", "block"),)


def test_cells_that_do_not_divide_a_token_are_refused() -> None:
    with pytest.raises(ValueError, match="token of 8 pixels has no whole number of cells of 3: set cell to one of 8"):
        build({"cell": 3})


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("maskfeat", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("maskfeat", CASES["four"])


def test_two_ranks_with_other_numbers_of_hidden_patches_equal_one() -> None:
    harness.check_two_ranks("maskfeat", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("maskfeat", CASES["four"])


def test_overfits_eight_images() -> None:
    objective = build(CASES["one cell a patch"])
    tokens, batch = harness.make_inputs(objective.needs, images=8)
    leaves = [nn.Parameter(x.detach()) for x in (tokens[objective.masked].cls, tokens[objective.masked].patches)]
    optimizer = torch.optim.AdamW([*objective.parameters(), *leaves], lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        logs = objective.loss({objective.masked: Tokens(*leaves)}, batch, harness.now())
        logs["loss"].backward()
        optimizer.step()
    assert logs["loss"] < 0.1 * logs["baseline"]
