"""The encoder wrapper: equal to timm when nothing is hidden, and hiding does what it says."""

import pytest
import timm
import torch

from hybrid_ssl.encoder import EncoderSettings, SwinEncoder, VitEncoder, build_encoder, wrap

SMALL_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 4}
VITS = [
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch8_224",
    "vit_base_patch16_clip_224",  # norm before the blocks
    "vit_base_patch16_siglip_224",  # attention pool
    "vit_base_patch16_siglip_gap_224",  # no class token
    "vit_medium_patch16_gap_240",
    "vit_wee_patch16_reg1_gap_256",  # register, norm after the pool
    "vit_so150m_patch16_reg4_gap_256",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",  # positions without class token
    "deit_tiny_distilled_patch16_224",  # two prefix tokens
    "vit_base_patch16_rpn_224",  # another block
    "vit_base_patch16_xp_224",
    "aimv2_large_patch14_224",
]
ROTARY = [
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_medium_patch16_rope_reg1_gap_256",
]
SWINS = ["swin_tiny_patch4_window7_224", "swin_s3_tiny_224", "swinv2_tiny_window8_256"]
SMALL_SWIN = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def small(name):
    if name.startswith("swin"):
        args, sizes = SMALL_SWIN | {"window_size": 4}, {"v": (64, 64)}
    else:
        args = {"depth": 2} if "mixed" in name else {"embed_dim": 64, "depth": 2, "num_heads": 4}
        side = 56 if "patch14" in name else 64
        sizes = {"v": (side, side), "w": (side // 2, side)}
    encoder = build_encoder(EncoderSettings(name=name, args=args), in_chans=3, sizes=sizes)
    encoder.add_mask_token()
    return encoder


@pytest.mark.parametrize("name", VITS + ROTARY + SWINS)
def test_unmasked_pass_equals_timm(name):
    torch.manual_seed(0)
    encoder = small(name).double().eval()
    side = 56 if "patch14" in name else 64
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    tokens = encoder(images)
    features = encoder.model.forward_features(images)
    pooled = encoder.model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(tokens.cls, pooled, rtol=1e-9, atol=1e-10)
    patches = (
        features.flatten(1, 2) if isinstance(encoder, SwinEncoder) else features[:, encoder.model.num_prefix_tokens :]
    )
    torch.testing.assert_close(tokens.patches, patches, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", VITS + ROTARY)
def test_dropping_equals_attention_among_the_visible(name):
    """Hiding by dropping before the embedding is the same as taking the visible rows of the embedded image."""
    torch.manual_seed(0)
    encoder = small(name).double().eval()
    side = 56 if "patch14" in name else 64
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    rows, columns = encoder.grid(side, side)
    mask = torch.stack([torch.randperm(rows * columns) for _ in range(3)]) >= 3
    tokens = encoder(images, mask, visible=3)
    assert tokens.patches.shape == (3, 3, encoder.model.num_features)
    changed = images.clone().view(3, 3, rows, side // rows, columns, side // columns)
    changed[mask.view(3, 1, rows, 1, columns, 1).expand_as(changed)] = 7.0  # hidden pixels must not matter
    torch.testing.assert_close(encoder(changed.view_as(images), mask, visible=3).patches, tokens.patches)
    none_hidden = encoder(images, torch.zeros_like(mask), visible=rows * columns)
    torch.testing.assert_close(none_hidden.patches, encoder(images).patches, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_mask_token_hides_pixels(name):
    torch.manual_seed(0)
    encoder = small(name).double().eval()
    rows, columns = encoder.grid(64, 64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    mask = torch.zeros(2, rows * columns, dtype=torch.bool)
    mask[:, 1] = True
    stride = encoder.stride
    changed = images.clone()
    changed[:, :, :stride, stride : 2 * stride] = 3.0
    torch.testing.assert_close(encoder(changed, mask).patches, encoder(images, mask).patches)
    assert not torch.allclose(encoder(changed).patches, encoder(images).patches)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_there_is_no_stochastic_depth_unless_asked_for(name: str):
    encoder = build_encoder(
        EncoderSettings(name=name), in_chans=3, sizes={"v": (256, 256) if "v2" in name else (224, 224)}
    )
    assert encoder.noise_rows == 0  # timm's Swin has a rate of 0.1 of its own


def test_stochastic_depth_is_a_function_of_the_noise():
    encoder = build_encoder(
        EncoderSettings(name="vit_tiny_patch16_224", args=SMALL_VIT, drop_path=0.5), in_chans=3, sizes={"v": (32, 32)}
    )
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(encoder.noise_rows, 4)
    assert torch.equal(encoder(images, noise=noise).cls, encoder(images, noise=noise).cls)
    assert not torch.equal(encoder(images, noise=noise).cls, encoder(images).cls)
    assert torch.equal(encoder(images).cls, encoder(images).cls)
    encoder.gradient_checkpointing = True
    first, second = encoder(images, noise=noise), encoder(images)  # a later pass must not change the recomputed noise
    (first.cls.sum() + second.cls.sum()).backward()
    checkpointed = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    encoder.gradient_checkpointing = False
    (encoder(images, noise=noise).cls.sum() + encoder(images).cls.sum()).backward()
    for got, want in zip(checkpointed, [p.grad for p in encoder.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["convnext_atto", "resnet18"])
def test_other_families_pool_but_do_not_mask(family):
    encoder = wrap(timm.create_model(family, num_classes=0))
    images = torch.randn(2, 3, 64, 64)
    assert encoder(images).cls.shape == (2, encoder.model.num_features)
    with pytest.raises(ValueError, match="cannot be masked"):
        encoder(images, torch.zeros(2, 1, dtype=torch.bool))


def test_swin_refuses_to_drop():
    encoder = small("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="replaced"):
        encoder(torch.randn(1, 3, 64, 64), torch.zeros(1, 4, dtype=torch.bool), visible=1)


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_number_of_channels(channels):
    encoder = build_encoder(
        EncoderSettings(name="vit_tiny_patch16_224", args=SMALL_VIT | {"patch_size": 8}),
        in_chans=channels,
        sizes={"v": (32, 48)},
    )
    assert isinstance(encoder, VitEncoder)
    assert encoder.spec({"v": (32, 48)}, {"v": 1}).grids["v"] == (4, 6)
    assert encoder(torch.randn(2, channels, 32, 48)).patches.shape == (2, 24, 48)


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, 64, "vit_tiny_patch16_224"),
        ({"name": "vit_tiny_patch16_224"}, 60, "multiple of 16"),
        ({"name": "swin_tiny_patch4_window7_224"}, 192, "window_size"),
        ({"name": "vit_tiny_patch16_224", "args": {"nonsense": 1}}, 64, "nonsense"),
        ({"name": "vit_tiny_patch16_224", "args": {"proj_drop_rate": 0.1}}, 64, "dropout"),
        ({"name": "swin_tiny_patch4_window7_224", "position": "sincos"}, 224, "position"),
    ],
)
def test_what_cannot_work_is_refused(settings, size, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(EncoderSettings(**settings), in_chans=3, sizes={"v": (size, size)})


def test_sincos_positions_are_fixed():
    encoder = build_encoder(
        EncoderSettings(
            name="vit_tiny_patch16_224", args=SMALL_VIT, position="sincos", scheme="moco", freeze_patch_embed=True
        ),
        in_chans=3,
        sizes={"v": (32, 32)},
    )
    assert not encoder.model.pos_embed.requires_grad
    assert encoder.model.pos_embed[0, 0].abs().sum() == 0
    assert not encoder.model.patch_embed.proj.weight.requires_grad
