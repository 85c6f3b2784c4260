import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from hybrid_ssl.data.settings import ViewSettings
from hybrid_ssl.data.views import Views
from hybrid_ssl.encoder import wrap
from hybrid_ssl.objectives.beit import BEiT
from hybrid_ssl.plan import Batch, EncoderSpec, Tokens
from tests.objectives import harness
from tests.tiny_tokenizer import write_tokenizer

SMALLER = replace(  # a second view of half the size
    harness.SPEC,
    grids={**harness.SPEC.grids, "tokenizer": (2, 2)},
    crops={**harness.SPEC.crops, "tokenizer": 1},
    sizes={"plain": (32, 32), "tokenizer": (16, 16)},
    made={"tokenizer": frozenset({"like=plain"})},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half")
    write_tokenizer(out, stride=4)
    return out


def settings(folder: Path, **changes: object) -> harness.Settings:
    return {"tokenizer": str(folder), "tokenizer_view": None, **changes}


def build(asked: harness.Settings, spec: EncoderSpec = harness.SPEC) -> BEiT:
    objective = harness.build("beit", asked, spec)
    assert isinstance(objective, BEiT)
    return objective


def pixels(batch: Batch) -> Tensor:
    return batch.views["plain"].mul(255).round().div(255)


def test_loss_is_the_mean_cross_entropy_of_hidden_patches_one_by_one(folder: Path) -> None:
    objective = build(settings(folder))
    tokens, batch = harness.make_inputs(objective.needs)
    ids = objective.tokenizer.ids(pixels(batch))  # [B, N]
    assert len(ids.unique()) > 3
    terms, hits = [], 0
    for image, patch in batch.masks["block"].nonzero().tolist():
        logits = objective.head(tokens[objective.masked].patches[image, patch]).tolist()
        total = math.log(sum(math.exp(x) for x in logits))
        terms.append(total - logits[int(ids[image, patch])])
        hits += logits.index(max(logits)) == int(ids[image, patch])
    logs = objective.loss(tokens, batch, harness.now())
    torch.testing.assert_close(logs["loss"].item(), sum(terms) / len(terms))
    torch.testing.assert_close(logs["accuracy"].item(), hits / len(terms))
    logs["loss"].backward()
    gradient = tokens[objective.masked].patches.grad
    assert gradient is not None and torch.equal(gradient.any(-1), batch.masks["block"])


def test_loss_begins_at_ln_k(folder: Path) -> None:
    objective = build(settings(folder))
    loss = objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"]
    assert abs(loss.item() - math.log(8)) < 0.15


def test_perplexity_counts_the_codes_of_the_targets(folder: Path) -> None:
    objective = build(settings(folder))
    tokens, batch = harness.make_inputs(objective.needs)
    ids = objective.tokenizer.ids(pixels(batch))[batch.masks["block"]]
    share = torch.bincount(ids, minlength=8).double() / len(ids)
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
    found = objective.loss(tokens, batch, harness.now())["perplexity"]
    torch.testing.assert_close(found.item(), expected)


def test_tokenizer_sees_the_loaders_pixels_not_the_normalised_ones(folder: Path) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    objective = build(settings(folder), replace(harness.SPEC, mean=mean, std=std)).float()
    bits = torch.randint(256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shape = (1, -1, 1, 1)
    offset, scale = (torch.tensor(x).view(shape) * 255 for x in (mean, std))
    normalised = (bits.float() - offset) / scale  # as the pretrainer does
    seen: list[Tensor] = []
    objective.tokenizer.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = objective.ids(normalised)
    assert torch.equal(seen[0], bits.float() / 255)
    assert torch.equal(found, objective.tokenizer.ids(bits.float() / 255))


def test_ids_are_those_of_the_patches_at_the_same_place(half: Path) -> None:
    objective = build(settings(half, tokenizer_view="tokenizer"), SMALLER).float()
    assert objective.reads == ("tokenizer",)
    image = torch.randint(256, (3, 60, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    views = Views({"plain": ViewSettings(size=32), "tokenizer": ViewSettings(size=16, like="plain")})
    made = views(image, seed=0, epoch=0, sample_id=3)
    shrunk = torch.nn.functional.interpolate(made["plain"].float(), size=(16, 16), mode="area")
    both = torch.stack([shrunk.flatten(), made["tokenizer"].float().flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.8, "the second view shows another crop"
    before = objective.ids(made["tokenizer"].float() / 255).view(4, 4)
    moved = objective.ids((made["tokenizer"].float() / 255).flip(3)).view(4, 4)
    assert before.shape == (4, 4) and not torch.equal(before, moved)


def test_two_views_or_one_of_the_same_pixels_agree(folder: Path, half: Path) -> None:
    objective = build(settings(half, tokenizer_view="tokenizer"), SMALLER)
    tokens, batch = harness.make_inputs(objective.needs, spec=SMALLER)
    ids = objective.tokenizer.ids(batch.views["tokenizer"].mul(255).round().div(255))
    rows = batch.hidden_rows("block")
    logits = objective.head(tokens[objective.masked].patches.flatten(0, 1)[rows])
    expected = nn.functional.cross_entropy(logits, ids.flatten()[rows])
    torch.testing.assert_close(objective.loss(tokens, batch, harness.now())["loss"], expected)


def test_a_run_keeps_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    first = build(settings(folder))
    write_tokenizer(tmp_path, seed=1)
    second = build(settings(tmp_path))
    _, batch = harness.make_inputs(first.needs)
    images = batch.views["plain"]
    assert not torch.equal(first.ids(images), second.ids(images)) and not torch.equal(
        first.fingerprint, second.fingerprint
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.ids(images), second.ids(images)) and torch.equal(first.fingerprint, second.fingerprint)


def test_tokenizer_is_frozen_and_stays_in_eval(folder: Path) -> None:
    objective = build(settings(folder)).train()
    assert objective.training and not any(module.training for module in objective.tokenizer.modules())
    before = {name: value.clone() for name, value in objective.tokenizer.state_dict().items()}
    objective.loss(*harness.make_inputs(objective.needs), harness.now())["loss"].backward()
    assert all(p.grad is None for p in objective.tokenizer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in objective.tokenizer.state_dict().items())


def test_what_does_not_fit_is_refused(folder: Path, half: Path) -> None:
    with pytest.raises(ValueError, match="set `tokenizer` to its folder; train one: hybrid-ssl tokenizer --source"):
        build({})
    with pytest.raises(ValueError, match="has the sha256 [0-9a-f]{64}, not 00000000"):
        build(settings(folder, sha256="00000000"))
    with pytest.raises(ValueError, match="reads 3 channels, the images have 1: train one with --channels 1"):
        build(settings(folder), replace(harness.SPEC, in_chans=1))
    with pytest.raises(
        ValueError, match=r"32 x 32 pixels does not have one square of 4 .* views.plain.size=\[16, 16\]"
    ):
        build(settings(half))
    with pytest.raises(ValueError, match="there is no view 'tokenizer'; the recipe's views are: global"):
        build(settings(half, tokenizer_view="tokenizer"))
    other = replace(SMALLER, made={"tokenizer": frozenset()})
    with pytest.raises(ValueError, match="shows other crops than 'plain'.*set views.tokenizer.like=plain"):
        build(settings(half, tokenizer_view="tokenizer"), other)


@pytest.mark.parametrize(
    "model",
    [
        VisionTransformer(32, 8, num_classes=0, embed_dim=24, depth=1, num_heads=2),
        SwinTransformer(32, 2, num_classes=0, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 2), window_size=4),
    ],
)
def test_trains_the_mask_token_of_a_vit_and_of_a_swin(model: nn.Module, folder: Path) -> None:
    encoder = wrap(model)
    encoder.add_mask_token()
    encoder.double()
    objective = build(settings(folder), encoder.spec({"plain": (32, 32)}, {"plain": 1}))
    _, batch = harness.make_inputs(objective.needs)
    tokens = encoder(batch.views["plain"], batch.masks["block"])
    objective.loss({objective.masked: tokens}, batch, harness.now())["loss"].backward()
    assert encoder.mask_token is not None and encoder.mask_token.grad is not None and encoder.mask_token.grad.any()


def test_a_batch_with_nothing_hidden_has_loss_zero(folder: Path) -> None:
    objective = build(settings(folder))
    tokens, batch = harness.make_inputs(objective.needs, masks={"block": torch.zeros(4, 16, dtype=torch.bool)})
    logs = objective.loss(tokens, batch, harness.now())
    assert logs["loss"] == 0 and logs["loss"].requires_grad and logs["accuracy"] == 0


def test_every_parameter_gets_a_gradient(folder: Path) -> None:
    harness.check_gradients("beit", settings(folder))


def test_state_round_trip(folder: Path) -> None:
    harness.check_state("beit", settings(folder))


def test_two_ranks_with_other_numbers_of_hidden_patches_equal_one(folder: Path) -> None:
    harness.check_two_ranks("beit", {"plain": settings(folder)})


def test_half_precision(folder: Path) -> None:
    harness.check_half_precision("beit", settings(folder))


def test_overfits_eight_images(folder: Path) -> None:
    objective = build(settings(folder))
    tokens, batch = harness.make_inputs(objective.needs, images=8)
    leaves = [nn.Parameter(x.detach()) for x in tokens[objective.masked][:2]]
    trained = [p for p in [*objective.parameters(), *leaves] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        logs = objective.loss({objective.masked: Tokens(*leaves)}, batch, harness.now())
        logs["loss"].backward()
        optimizer.step()
    assert logs["loss"] < 0.1 and logs["accuracy"] == 1
