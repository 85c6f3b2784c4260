import pytest
import torch
import torch.nn.functional as F
from timm.models import SwinTransformer, VisionTransformer
from torch import nn

from hybrid_ssl.encoder import VitEncoder, wrap
from hybrid_ssl.objectives.data2vec import Data2Vec, average_layers
from hybrid_ssl.plan import Batch, EncoderSpec, Forward, Tokens
from tests.objectives import harness

CASES = {"two layers": {"layers": 2}, "one layer": {"layers": 1, "beta": 0.5}}


def build(settings: harness.Settings = CASES["two layers"], spec: EncoderSpec = harness.SPEC) -> Data2Vec:
    objective = harness.build("data2vec", settings, spec)
    assert isinstance(objective, Data2Vec)
    return objective


def vit() -> VisionTransformer:
    return VisionTransformer(32, 8, num_classes=0, embed_dim=24, depth=3, num_heads=2, init_values=0.3)


def swin() -> SwinTransformer:
    sizes = {"depths": (1, 1, 2), "num_heads": (1, 2, 2), "window_size": 4}
    return SwinTransformer(32, 2, num_classes=0, embed_dim=8, **sizes)


def norm(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / (variance + 1e-5) ** 0.5 for v in x]


def test_loss_is_the_papers_value_by_value() -> None:
    objective = build({"layers": 2, "beta": 2.0})
    tokens, batch = harness.make_inputs(objective.needs)
    terms = []
    for image, patch in batch.masks["block"].nonzero().tolist():
        normed = [norm(x[image, patch].tolist()) for x in tokens[objective.whole].layers]
        target = norm([(a + b) / 2 for a, b in zip(*normed, strict=True)])
        predicted = (3 * objective.head(3 * tokens[objective.masked].patches[image, patch])).tolist()
        for t, p in zip(target, predicted, strict=True):
            distance = abs(t - p)
            terms.append(distance**2 / 4 if distance < 2 else distance - 1)
    assert {t > 1 for t in terms} == {True, False}, "both branches of smooth L1 have to be met"
    with torch.no_grad():
        tokens[objective.masked].patches.mul_(3)  # large enough to leave the square branch
        objective.head.weight.mul_(3)
        objective.head.bias.mul_(3)
    found = objective.loss(tokens, batch, harness.now())
    torch.testing.assert_close(found["loss"].item(), sum(terms) / len(terms))
    found["loss"].backward()
    gradient = tokens[objective.masked].patches.grad
    assert gradient is not None and torch.equal(gradient.any(-1), batch.masks["block"])


def test_each_layer_is_normalised_before_the_mean_and_the_mean_again() -> None:
    draw = torch.Generator().manual_seed(0)
    small, large = torch.randn(5, 8, generator=draw), 100 * torch.randn(5, 8, generator=draw)
    target = average_layers([small, large])
    torch.testing.assert_close(target, F.layer_norm((F.layer_norm(small, [8]) + F.layer_norm(large, [8])) / 2, [8]))
    assert not torch.allclose(target, F.layer_norm(small + large, [8]), atol=0.1), "mean first: the large one decides"
    torch.testing.assert_close(target.std(1, correction=0), torch.ones(5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("model", [vit(), swin()])
def test_layers_are_block_outputs_without_the_last_norm(model: nn.Module) -> None:
    encoder = wrap(model).double().eval()
    nn.init.uniform_(model.norm.weight)  # type: ignore[arg-type, union-attr]
    seen: list[torch.Tensor] = []
    for block in encoder.blocks()[-2:]:
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tokens = encoder(images, layers=2)
    plain = encoder(images)
    assert plain.layers == () and torch.equal(plain.patches, tokens.patches)
    prefix = 1 if isinstance(encoder, VitEncoder) else 0
    for found, block_output in zip(tokens.layers, seen[:2], strict=True):
        expected = block_output[:, prefix:] if prefix else block_output.flatten(1, 2)
        assert found.shape == plain.patches.shape and torch.equal(found, expected)
    torch.testing.assert_close(encoder.model.norm(tokens.layers[-1]), plain.patches)
    assert not torch.allclose(tokens.layers[-1], plain.patches)


@pytest.mark.parametrize("model", [vit(), swin()])
def test_trains_the_mask_token_of_a_vit_and_of_a_swin(model: nn.Module) -> None:
    encoder = wrap(model)
    encoder.add_mask_token()
    encoder.double()
    objective = build(spec=encoder.spec({"plain": (32, 32)}, {"plain": 1}))
    _, batch = harness.make_inputs(objective.needs, spec=harness.SPEC)
    images = batch.views["plain"]
    with torch.no_grad():
        whole = encoder(images, layers=2)
    tokens = {objective.masked: encoder(images, batch.masks["block"]), objective.whole: whole}
    objective.loss(tokens, batch, harness.now())["loss"].backward()
    assert encoder.mask_token is not None and encoder.mask_token.grad is not None and encoder.mask_token.grad.any()


def test_more_layers_than_an_encoder_can_give_are_refused() -> None:
    spec = wrap(swin()).spec({"plain": (32, 32)}, {"plain": 1})
    assert (spec.depth, spec.layers) == (4, 2)
    with pytest.raises(
        ValueError, match="3 blocks are to be averaged, but the encoder has 2 .*set layers to 2 or less"
    ):
        build({"layers": 3}, spec)
    with pytest.raises(ValueError, match="use a timm ViT or Swin"):
        build({"layers": 1}, EncoderSpec(dim=8, stride=32, family="pooled", depth=0, grids={"plain": (1, 1)}))


def test_teacher_sees_the_whole_image_and_shares_its_pass() -> None:
    objective = build()
    assert objective.needs == (Forward("student", "plain", "block"), Forward("teacher", "plain"))
    assert objective.needs[1].layers == 2


def test_a_pass_with_more_layers_than_asked_for_serves_as_well() -> None:
    objective = build({"layers": 1})
    tokens, batch = harness.make_inputs(objective.needs)
    whole = tokens[objective.whole]
    more = {**tokens, objective.whole: whole._replace(layers=(torch.zeros_like(whole.patches), *whole.layers))}
    losses = [objective.loss(t, batch, harness.now())["loss"] for t in (tokens, more)]
    assert torch.equal(*losses)


def test_spread_of_targets_tells_a_collapse() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs)
    healthy = objective.loss(tokens, batch, harness.now())["target_spread"]
    one = torch.randn(32, dtype=torch.float64).expand(4, 16, 32)
    tokens[objective.whole] = tokens[objective.whole]._replace(layers=(one, one))
    assert healthy > 0.8 and objective.loss(tokens, batch, harness.now())["target_spread"] < 1e-9


def test_a_batch_with_nothing_hidden_has_loss_zero() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, masks={"block": torch.zeros(4, 16, dtype=torch.bool)})
    logs = objective.loss(tokens, batch, harness.now())
    assert all(value == 0 for value in logs.values()) and logs["loss"].requires_grad


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("data2vec", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("data2vec", CASES["two layers"])


def test_two_ranks_with_other_numbers_of_hidden_patches_equal_one() -> None:
    harness.check_two_ranks("data2vec", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("data2vec", CASES["two layers"])


def test_overfits_eight_images() -> None:
    objective = build()
    tokens, batch = harness.make_inputs(objective.needs, images=8)
    leaves = [nn.Parameter(x.detach()) for x in tokens[objective.masked][:2]]
    optimizer = torch.optim.AdamW([*objective.parameters(), *leaves], lr=2e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = objective.loss({**tokens, objective.masked: Tokens(*leaves)}, Batch(*batch), harness.now())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
