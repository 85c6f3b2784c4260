"""DINOv2 and DINOv3: registers, LayerScale, gated networks, rotary positions, in the names of their repositories."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.encoder.official.reference import (
    DEPTH,
    DIM,
    HEADS,
    State,
    attend,
    dense,
    layer_norm,
    linear,
    norm,
    patches,
    random_state,
    under,
    vit_shapes,
)
from tests.encoder.official.test_vits import assert_equal, double, images, load, save

SIZE = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


def scaled_block(s: State, name: str, x: Tensor, turn: object = None, eps: float = 1e-6) -> Tensor:
    """LayerScale, and a gated network where the file has one: w12 of v2, w1, w2, w3 of v3."""
    bias = s[f"{name}.attn.qkv.bias"] * s.get(f"{name}.attn.qkv.bias_mask", 1)
    qkv = layer_norm(s, f"{name}.norm1", x, eps) @ s[f"{name}.attn.qkv.weight"].mT + bias
    mixed = attend(*qkv.chunk(3, -1), HEADS, turn=turn)  # type: ignore[arg-type]
    x = x + s[f"{name}.ls1.gamma"] * dense(s, f"{name}.attn.proj", mixed)
    y, mlp = layer_norm(s, f"{name}.norm2", x, eps), f"{name}.mlp"
    if f"{mlp}.w12.weight" in s:
        gate, value = dense(s, f"{mlp}.w12", y).chunk(2, -1)
        y = dense(s, f"{mlp}.w3", F.silu(gate) * value)
    elif f"{mlp}.w1.weight" in s:
        y = dense(s, f"{mlp}.w3", F.silu(dense(s, f"{mlp}.w1", y)) * dense(s, f"{mlp}.w2", y))
    else:
        y = dense(s, f"{mlp}.fc2", F.gelu(dense(s, f"{mlp}.fc1", y)))
    return x + s[f"{name}.ls2.gamma"] * y


def dinov2(s: State, x: Tensor) -> Tensor:
    """Positions are for the class token and the patches; registers come between them afterwards and have none."""
    x = patches(s, "patch_embed.proj", x)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    if "register_tokens" in s:
        x = torch.cat([x[:, :1], s["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(DEPTH):
        x = scaled_block(s, f"blocks.{i}", x)
    return layer_norm(s, "norm", x)


def dinov2_shapes(registers: int, gated: bool) -> dict[str, tuple[int, ...]]:
    shapes = vit_shapes(patch=14, grid=2) | {"mask_token": (1, DIM)}
    shapes |= {"register_tokens": (1, registers, DIM)} if registers else {}
    for i in range(DEPTH):
        name = f"blocks.{i}"
        shapes |= {f"{name}.ls1.gamma": (DIM,), f"{name}.ls2.gamma": (DIM,)}
        if gated:
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith(f"{name}.mlp.")}
            shapes |= linear(f"{name}.mlp.w12", 128, DIM) | linear(f"{name}.mlp.w3", DIM, 64)
    return shapes


@pytest.mark.parametrize(
    ("name", "registers", "gated"),
    [
        ("vit_small_patch14_dinov2", 0, False),
        ("vit_small_patch14_reg4_dinov2", 4, False),
        ("vit_small_patch14_dinov2", 3, False),  # the file knows how many registers it has
        ("vit_small_patch14_reg4_dinov2", 0, False),
        ("vit_giant_patch14_dinov2", 0, True),
        ("vit_giant_patch14_reg4_dinov2", 4, True),
    ],
)
def test_dinov2_backbone(name: str, registers: int, gated: bool, tmp_path: Path) -> None:
    state = random_state(dinov2_shapes(registers, gated), 1)
    encoder = load(save(tmp_path, state), name, size=28, args=SIZE)
    summed = "added to it" in encoder.origin[-2]  # class token and its position, in float32
    assert summed == bool(registers or "reg4" in name)
    assert_equal(encoder, dinov2(double(state), images(28)), size=28, tolerance=1e-6 if summed else 1e-10)
    assert "(DINOv2)" in encoder.origin[0] and "mask_token" in encoder.origin[-1]


def test_dinov2_teacher_checkpoint_in_chunks(tmp_path: Path) -> None:
    """FSDP training saves `blocks.CHUNK.BLOCK`; the block's number counts through."""
    state = random_state(dinov2_shapes(0, False), 1)
    chunked = {
        name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for name, t in state.items()
    }
    heads = random_state(linear("dino_head.mlp.0", 8, DIM) | linear("ibot_head.mlp.0", 8, DIM), 3)
    file = save(tmp_path, {"teacher": under("backbone.", chunked) | heads})
    assert_equal(load(file, "vit_small_patch14_dinov2", 28, args=SIZE), dinov2(double(state), images(28)), size=28)


def dinov3(s: State, x: Tensor, temperature: float = 100.0) -> Tensor:
    """Patches' centres in [-1, 1], rows then columns, times 2 pi over the periods; prefix tokens are not turned."""
    x = patches(s, "patch_embed.proj", x)
    side, prefix = math.isqrt(x.shape[1]), 1 + s["storage_tokens"].shape[1]
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), s["storage_tokens"].expand(len(x), -1, -1), x], 1)
    width = DIM // HEADS
    centre = (torch.arange(side, dtype=x.dtype) + 0.5) / side * 2 - 1
    at = torch.cartesian_prod(centre, centre)  # [N, 2]
    periods = temperature ** (torch.arange(width // 4, dtype=x.dtype) * 4 / width)
    angle = (2 * math.pi * at.unsqueeze(-1) / periods).flatten(1).repeat(1, 2)  # [N, d]

    def turn(t: Tensor) -> Tensor:
        rest, t = t[:, :, :prefix], t[:, :, prefix:]
        first, second = t.chunk(2, -1)
        return torch.cat([rest, t * angle.cos() + torch.cat([-second, first], -1) * angle.sin()], 2)

    for i in range(DEPTH):
        x = scaled_block(s, f"blocks.{i}", x, turn, eps=1e-5)
    return layer_norm(s, "norm", x, eps=1e-5)


def dinov3_state(gated: bool, zero: bool) -> State:
    shapes = vit_shapes(patch=16, grid=2) | {"mask_token": (1, DIM), "storage_tokens": (1, 4, DIM)}
    for i in range(DEPTH):
        name = f"blocks.{i}"
        shapes |= {f"{name}.ls1.gamma": (DIM,), f"{name}.ls2.gamma": (DIM,)}
        if gated:
            shapes = {key: shape for key, shape in shapes.items() if not key.startswith(f"{name}.mlp.")}
            shapes |= linear(f"{name}.mlp.w1", 96, DIM) | linear(f"{name}.mlp.w2", 96, DIM)
            shapes |= linear(f"{name}.mlp.w3", DIM, 96)
    del shapes["pos_embed"]
    state = random_state(shapes, 1)
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * DIM)
        state[f"blocks.{i}.attn.qkv.bias_mask"][DIM : 2 * DIM] = 0
        if zero:
            state[f"blocks.{i}.attn.qkv.bias"].zero_()
    width = DIM // HEADS
    state["rope_embed.periods"] = (100.0 ** (torch.arange(width // 4) * 4 / width)).bfloat16()
    return state | random_state(norm("local_cls_norm"), 3)


@pytest.mark.parametrize(
    ("name", "gated", "zero"),
    [
        ("vit_small_patch16_dinov3", False, True),  # the published ones: biases that are all zero
        ("vit_small_patch16_dinov3", False, False),
        ("vit_small_patch16_dinov3_qkvb", False, False),
        ("vit_small_plus_patch16_dinov3", True, True),
    ],
)
def test_dinov3_backbone(name: str, gated: bool, zero: bool, tmp_path: Path) -> None:
    state = dinov3_state(gated, zero)
    encoder = load(save(tmp_path, state), name, size=32, args=SIZE)
    # timm's periods are float32
    assert_equal(encoder, dinov3(double(state), images(32)), size=32, tolerance=1e-6)
    assert ("qkv_bias=True" in encoder.origin[1]) == (name == "vit_small_patch16_dinov3" and not zero)
    assert "local_cls_norm" in encoder.origin[-1]


def test_dinov3_of_other_frequencies_is_refused(tmp_path: Path) -> None:
    state = dinov3_state(False, True)
    state["rope_embed.periods"] = state["rope_embed.periods"] * 2
    with pytest.raises(ValueError, match="rotary positions with other periods.*rope_temperature"):
        load(save(tmp_path, state), "vit_small_patch16_dinov3", size=32, args=SIZE)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers(gated: bool, tmp_path: Path) -> None:
    """Split q, k, v, without bias of k; evaluated by transformers itself."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=96,
        num_register_tokens=4,
        image_size=32,
        patch_size=16,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = DINOv3ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    name = "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3"
    model.save_pretrained(tmp_path)
    files = [tmp_path / "model.safetensors", tmp_path / "state.safetensors"]
    save_file(model.state_dict(), files[1])  # the names in memory differ from those on disk
    expected = model.double()(images(32)).last_hidden_state.detach()
    for file in files:
        encoder = load(file, name, size=32, args=SIZE)
        assert_equal(encoder, expected, size=32, tolerance=1e-6)
        assert "DINOv3 of transformers" in encoder.origin[0]
