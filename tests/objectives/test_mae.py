import pytest
import torch
from timm.models import VisionTransformer
from torch import nn

from hybrid_ssl.encoder import wrap
from hybrid_ssl.nn.patches import patchify
from hybrid_ssl.objectives.mae import MAE, MAESettings
from hybrid_ssl.plan import Batch, EncoderSpec, Progress, Tokens, visible_rows
from tests.objectives import harness

NOW = Progress(0, 10, 10)
P, GRID, VISIBLE = 4, (2, 3), 2


SMALL = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 4}
CASES = {"normalised": SMALL, "raw": {**SMALL, "norm_pixels": False}}


def build(width: int = 12, grid: tuple[int, int] = GRID, chans: int = 3, **more: object) -> MAE:
    torch.manual_seed(0)
    return MAE(MAESettings(**{"name": "mae", **SMALL, **more}), EncoderSpec(width, P, chans, grids={"plain": grid}))


def make_batch(images: int = 2, grid: tuple[int, int] = GRID, chans: int = 3, visible: int = VISIBLE) -> Batch:
    draw = torch.Generator().manual_seed(1)
    n = grid[0] * grid[1]
    order = torch.stack([torch.randperm(n, generator=draw) for _ in range(images)])
    mask = torch.ones(images, n, dtype=torch.bool).scatter(1, order[:, :visible], False)
    pixels = torch.randn(images, chans, grid[0] * P, grid[1] * P, generator=draw, dtype=torch.float64)
    return Batch({"plain": pixels}, {"random": mask})


def make_tokens(images: int = 2, width: int = 12, visible: int = VISIBLE) -> Tokens:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(images, 1 + visible, width, generator=draw, dtype=torch.float64)
    return Tokens(x[:, 0], x[:, 1:])


def loss_of(mae: MAE, tokens: Tokens, batch: Batch) -> torch.Tensor:
    return mae.loss({mae.visible: tokens}, batch, NOW)["loss"]


RENAMED = {
    "embeddings.position_embeddings": "pos_embed", "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "", "decoder_layers": "blocks", "decoder_": "", "layers.": "blocks.",
    "attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm": "norm",
}  # fmt: skip


def as_ours(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of transformers' ViTMAE encoder or decoder under our names; q, k, v become one matrix."""
    ours = {}
    for name, value in theirs.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            value = torch.cat([theirs[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        ours[name] = value
    return ours


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_and_gradients_equal_transformers_with_the_same_weights(norm_pixels: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=norm_pixels, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).double()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.2)
    theirs.decoder.initialize_weights(16)  # fixed positions
    mae = build(width=24, grid=(4, 4), norm_pixels=norm_pixels).double()
    weights = as_ours(theirs.decoder.state_dict())
    torch.testing.assert_close(mae.decoder.pos_embed, weights.pop("pos_embed"), atol=1e-7, rtol=0)
    theirs.decoder.decoder_pos_embed.data = mae.decoder.pos_embed  # they may differ in float32's last bit
    mae.decoder.load_state_dict(weights)
    encoder = wrap(VisionTransformer(16, 4, num_classes=0, embed_dim=24, depth=2, num_heads=2)).double()
    encoder.model.load_state_dict(as_ours(theirs.vit.state_dict()))

    images, noise = torch.randn(3, 3, 16, 16).double(), torch.rand(3, 16)
    expected = theirs(images, noise=noise)
    mask = expected.mask.bool()
    loss = loss_of(mae, encoder(images, mask, visible=4), Batch({"plain": images}, {"random": mask}))
    torch.testing.assert_close(loss, expected.loss, rtol=1e-10, atol=0)

    loss.backward(), expected.loss.backward()
    for found, wanted in ((mae.decoder, theirs.decoder), (encoder.model, theirs.vit)):
        gradients = gradients_of(found)
        gradients.pop("pos_embed", None)  # trained only in ours, here
        torch.testing.assert_close(gradients, as_ours(gradients_of(wanted)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("grid", "chans"), [((2, 3), 3), ((3, 1), 1), ((2, 2), 5)])
def test_any_grid_and_number_of_channels(grid: tuple[int, int], chans: int) -> None:
    mae = build(grid=grid, chans=chans).double()
    tokens = {mae.visible: make_tokens(visible=1)}
    batch = make_batch(grid=grid, chans=chans, visible=1)
    entries = mae.loss(tokens, batch, NOW)
    assert entries["loss"].shape == () and entries["loss"].isfinite() and not entries["baseline"].requires_grad
    assert mae.reconstruct(tokens, batch).shape == batch.views["plain"].shape


def test_asks_for_dropped_patches() -> None:
    (request,) = build(view="plain", mask="random").needs
    assert request.drop and request.net == "student"


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case: str) -> None:
    harness.check_gradients("mae", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("mae", SMALL)


def test_two_ranks_equal_one() -> None:
    harness.check_two_ranks("mae", CASES)


def test_half_precision() -> None:
    harness.check_half_precision("mae", SMALL)


def test_overfits_eight_images() -> None:
    mae, batch = build(decoder_dim=64).double(), make_batch(images=8)  # noise: 32 patches need rank 32
    tokens = [nn.Parameter(x) for x in make_tokens(images=8)[:2]]
    optimizer = torch.optim.AdamW([*mae.parameters(), *tokens], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        entries = mae.loss({mae.visible: Tokens(*tokens)}, batch, NOW)
        entries["loss"].backward()
        optimizer.step()
    assert entries["loss"] < 0.1 * entries["baseline"]


def test_loss_ignores_visible_pixels() -> None:
    mae, batch = build().double(), make_batch()
    visible = visible_rows(batch.masks["random"], VISIBLE)
    other = batch.views["plain"].clone()
    patches = other.unfold(2, P, P).unfold(3, P, P)  # [2, 3, rows, columns, P, P], a view
    for image in range(2):
        for position in visible[image].tolist():
            patches[image, :, position // GRID[1], position % GRID[1]] += 1
    assert not torch.equal(other, batch.views["plain"])
    changed = batch._replace(views={"plain": other})
    assert torch.equal(loss_of(mae, make_tokens(), changed), loss_of(mae, make_tokens(), batch))


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_reconstruction_keeps_visible_pixels_and_undoes_the_normalisation(norm_pixels: bool) -> None:
    mae, batch = build(norm_pixels=norm_pixels).double(), make_batch()
    nn.init.zeros_(mae.decoder.pred.weight)  # predicts 0: a patch's mean, or the mean of the normalised image
    painted = patchify(mae.reconstruct({mae.visible: make_tokens()}, batch), P, "p q c")
    pixels, mask = patchify(batch.views["plain"], P, "p q c"), batch.masks["random"]
    assert torch.equal(painted[~mask], pixels[~mask])
    expected = pixels[mask].mean(1, keepdim=True) if norm_pixels else torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(painted[mask], expected.expand_as(painted[mask]))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="decoder_heads 5 does not divide decoder_dim 16"):
        MAESettings(name="mae", decoder_dim=16, decoder_heads=5)
