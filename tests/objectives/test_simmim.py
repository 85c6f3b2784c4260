import pytest
import torch
from timm.models import SwinTransformer, VisionTransformer
from torch import nn

from hybrid_ssl.encoder import wrap
from hybrid_ssl.nn.patches import patchify
from hybrid_ssl.objectives.simmim import SimMIM, SimMIMSettings
from hybrid_ssl.plan import Batch, EncoderSpec, Progress, Tokens
from tests.objectives import harness

NOW = Progress(0, 10, 10)
STRIDE, GRID = 4, (2, 3)


def build(width: int = 12, grid: tuple[int, int] = GRID, chans: int = 3, stride: int = STRIDE) -> SimMIM:
    torch.manual_seed(0)
    spec = EncoderSpec(width, stride, in_chans=chans, grids={"plain": grid})
    return SimMIM(SimMIMSettings(name="simmim"), spec).double()


def make_batch(images: int = 2, grid: tuple[int, int] = GRID, chans: int = 3, stride: int = STRIDE) -> Batch:
    draw = torch.Generator().manual_seed(1)
    n = grid[0] * grid[1]
    mask = torch.rand(images, n, generator=draw).argsort(1) < (n + 1) // 2
    shape = (images, chans, grid[0] * stride, grid[1] * stride)
    return Batch({"plain": torch.randn(shape, generator=draw, dtype=torch.float64)}, {"units": mask})


def make_tokens(images: int = 2, width: int = 12, n: int = 6) -> Tokens:
    draw = torch.Generator().manual_seed(2)
    patches = torch.randn(images, n, width, generator=draw, dtype=torch.float64)
    return Tokens(patches.mean(1), patches)


def entries_of(simmim: SimMIM, tokens: Tokens, batch: Batch) -> dict[str, torch.Tensor]:
    return simmim.loss({simmim.masked: tokens}, batch, NOW)


def loss_of(simmim: SimMIM, tokens: Tokens, batch: Batch) -> torch.Tensor:
    return entries_of(simmim, tokens, batch)["loss"]


def test_loss_is_the_papers_pixel_by_pixel() -> None:
    simmim, tokens, batch = build(), make_tokens(), make_batch()
    total, pixels = 0.0, 0
    for image in range(2):
        for position in range(6):
            if not batch.masks["units"][image, position]:
                continue
            predicted = (simmim.head.weight @ tokens.patches[image, position] + simmim.head.bias).tolist()
            for y in range(STRIDE):
                for x in range(STRIDE):
                    pixels += 1
                    for channel in range(3):
                        row, column = position // GRID[1] * STRIDE + y, position % GRID[1] * STRIDE + x
                        value = batch.views["plain"][image, channel, row, column].item()
                        total += abs(predicted[channel * STRIDE**2 + y * STRIDE + x] - value)
    assert loss_of(simmim, tokens, batch).item() == pytest.approx(total / pixels / 3, rel=1e-12)


def vit() -> tuple[nn.Module, int, int]:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        encoder_stride=4,
    )  # fmt: skip
    return ViTForMaskedImageModeling(config), 24, 4


def swin() -> tuple[nn.Module, int, int]:
    from transformers import SwinConfig, SwinForMaskedImageModeling

    config = SwinConfig(
        image_size=16, patch_size=1, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4, encoder_stride=4
    )
    return SwinForMaskedImageModeling(config), 32, 4


@pytest.mark.parametrize("family", [vit, swin])
def test_loss_and_gradients_equal_transformers_with_the_same_weights(family) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs, width, stride = family()
    theirs = theirs.double()
    simmim, batch = build(width, (4, 4), stride=stride), make_batch(grid=(4, 4), stride=stride)
    convolution = theirs.decoder[0]
    nn.init.normal_(convolution.bias)
    simmim.head.load_state_dict({"weight": convolution.weight[:, :, 0, 0], "bias": convolution.bias})

    mask = batch.masks["units"]
    scale = 4 // theirs.config.patch_size  # their masks are on the grid of the first patches
    fine = mask.reshape(2, 4, 4).repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)
    out = theirs(batch.views["plain"], bool_masked_pos=fine)
    encoder = theirs.vit if family is vit else theirs.swin
    patches = encoder(batch.views["plain"], bool_masked_pos=fine).last_hidden_state[:, 1 if family is vit else 0 :]
    tokens = Tokens(patches.mean(1), patches)
    loss = loss_of(simmim, tokens, batch)
    torch.testing.assert_close(loss, out.loss, rtol=1e-10, atol=0)

    trunk = [p for p in encoder.parameters() if p.requires_grad]
    expected = torch.autograd.grad(out.loss, [*convolution.parameters(), *trunk], allow_unused=True)
    found = torch.autograd.grad(loss, [*simmim.head.parameters(), *trunk], allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-9, atol=1e-13)

    painted = simmim.reconstruct({simmim.masked: tokens}, batch)
    pixel_mask = torch.kron(mask.reshape(2, 1, 4, 4).double(), torch.ones(4, 4).double()).bool()
    torch.testing.assert_close(painted, torch.where(pixel_mask, out.reconstruction, batch.views["plain"]))


@pytest.mark.parametrize(("grid", "chans", "stride"), [((2, 3), 1, 4), ((3, 1), 5, 2), ((1, 2), 3, 32)])
def test_any_grid_stride_and_number_of_channels(grid: tuple[int, int], chans: int, stride: int) -> None:
    simmim, batch = build(grid=grid, chans=chans, stride=stride), make_batch(2, grid, chans, stride)
    tokens = {simmim.masked: make_tokens(n=grid[0] * grid[1])}
    entries = simmim.loss(tokens, batch, NOW)
    assert entries["loss"].isfinite() and not entries["baseline"].requires_grad
    assert simmim.reconstruct(tokens, batch).shape == batch.views["plain"].shape


@pytest.mark.parametrize(
    "model",
    [
        VisionTransformer(16, 4, num_classes=0, embed_dim=24, depth=1, num_heads=2),
        SwinTransformer(16, 1, num_classes=0, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 2), window_size=4),
    ],
)
def test_trains_the_mask_token_of_a_vit_and_of_a_swin(model: nn.Module) -> None:
    encoder, batch = wrap(model), make_batch(grid=(4, 4))
    encoder.add_mask_token()
    encoder.double()
    spec = encoder.spec({"plain": (16, 16)}, {"plain": 1})
    simmim = SimMIM(SimMIMSettings(name="simmim"), spec).double()
    loss_of(simmim, encoder(batch.views["plain"], batch.masks["units"]), batch).backward()
    assert encoder.mask_token is not None and encoder.mask_token.grad is not None and encoder.mask_token.grad.any()


def test_asks_for_mask_tokens_in_the_students_place() -> None:
    (request,) = build().needs
    assert request.mask == "units" and not request.drop and request.net == "student"


def test_every_parameter_gets_a_gradient() -> None:
    harness.check_gradients("simmim", {})


def test_state_round_trip() -> None:
    harness.check_state("simmim", {})


def test_half_precision() -> None:
    harness.check_half_precision("simmim", {})


def test_two_halves_average_to_the_double_batch() -> None:
    simmim, tokens, batch = build(), make_tokens(images=4), make_batch(images=4)
    halves = [
        loss_of(
            simmim,
            Tokens(tokens.cls[rows], tokens.patches[rows]),
            Batch({"plain": batch.views["plain"][rows]}, {"units": batch.masks["units"][rows]}),
        )
        for rows in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), loss_of(simmim, tokens, batch))


def test_overfits_eight_images() -> None:
    simmim, batch = build(width=48), make_batch(images=8)
    tokens = nn.Parameter(make_tokens(images=8, width=48).patches)
    optimizer = torch.optim.AdamW([*simmim.parameters(), tokens], lr=2e-2)
    for _ in range(200):
        optimizer.zero_grad()
        entries = entries_of(simmim, Tokens(tokens.mean(1), tokens), batch)
        entries["loss"].backward()
        optimizer.step()
    assert entries["loss"] < 0.1 * entries["baseline"]


def test_loss_ignores_visible_patches() -> None:
    simmim, tokens, batch = build(), make_tokens(), make_batch()
    visible = ~batch.masks["units"]
    patches = tokens.patches.clone()
    patches[visible] += 1
    pixel_mask = torch.kron(visible.reshape(2, 1, *GRID).double(), torch.ones(STRIDE, STRIDE).double())
    changed = batch._replace(views={"plain": batch.views["plain"] + pixel_mask})
    assert torch.equal(loss_of(simmim, tokens._replace(patches=patches), changed), loss_of(simmim, tokens, batch))


def test_rows_listed_by_the_loader_give_the_same_number() -> None:
    simmim, tokens, batch = build(), make_tokens(), make_batch()
    listed = batch._replace(hidden={"units": batch.hidden_rows("units")}, masks={})
    assert torch.equal(loss_of(simmim, tokens, listed), loss_of(simmim, tokens, batch))


def test_a_batch_with_nothing_hidden_gives_zero_and_finite_gradients() -> None:
    simmim, batch = build(), make_batch()
    entries = entries_of(simmim, make_tokens(), batch._replace(masks={"units": torch.zeros(2, 6, dtype=torch.bool)}))
    entries["loss"].backward()
    assert entries["loss"] == entries["baseline"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in simmim.parameters())


def test_reconstruction_keeps_visible_pixels() -> None:
    simmim, batch = build(), make_batch()
    painted = patchify(simmim.reconstruct({simmim.masked: make_tokens()}, batch), STRIDE, "c p q")
    pixels, mask = patchify(batch.views["plain"], STRIDE, "c p q"), batch.masks["units"]
    assert torch.equal(painted[~mask], pixels[~mask])
    assert (painted[mask] != pixels[mask]).all()
