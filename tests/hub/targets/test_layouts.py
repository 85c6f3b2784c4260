"""Key layouts of MMDetection, MMSegmentation and Detectron2: names and shapes as their backbones have them.

The layouts are written here by hand, after the constructors of those backbones; what the reordered weights compute is
checked with the operations that those libraries use (`nn.Unfold`, `nn.MultiheadAttention`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_ssl.hub.targets.detectron2 import to_detectron2
from hybrid_ssl.hub.targets.openmmlab import to_mmdet, to_mmseg
from hybrid_ssl.hub.targets.source import Source

from .encoders import source

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vitdet(positions: int, width: int = 48, depth: int = 2) -> Shapes:
    """`ViT(patch_size=16, embed_dim=48, depth=2, use_rel_pos=False)` of Detectron2 and of MMDetection's ViTDet."""
    shapes: Shapes = {
        "pos_embed": (1, positions, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= norm(f"blocks.{i}.norm1", width) | norm(f"blocks.{i}.norm2", width)
        shapes |= linear(f"blocks.{i}.attn.qkv", 3 * width, width) | linear(f"blocks.{i}.attn.proj", width, width)
        shapes |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width) | linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
    return shapes


def mmseg_vit(width: int = 48, depth: int = 2) -> Shapes:
    """`VisionTransformer(img_size=64, embed_dims=48, num_layers=2, final_norm=True)` of MMSegmentation."""
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.projection.weight": (width, 3, 16, 16),
        "patch_embed.projection.bias": (width,),
        **norm("ln1", width),
    }
    for i in range(depth):
        name = f"layers.{i}"
        shapes |= norm(f"{name}.ln1", width) | norm(f"{name}.ln2", width)
        shapes |= {f"{name}.attn.attn.in_proj_weight": (3 * width, width)}
        shapes |= {f"{name}.attn.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{name}.attn.attn.out_proj", width, width)
        shapes |= linear(f"{name}.ffn.layers.0.0", 4 * width, width) | linear(f"{name}.ffn.layers.1", width, 4 * width)
    return shapes


def swin(names: dict[str, str], window: int = 7) -> Shapes:
    """`SwinTransformer(embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=7)`, one output norm."""
    width, depths, heads = 12, (1, 2, 1, 1), (1, 2, 2, 4)
    shapes: Shapes = {
        f"patch_embed.{names['proj']}.weight": (width, 3, 4, 4),
        f"patch_embed.{names['proj']}.bias": (width,),
        **norm("patch_embed.norm", width),
        **norm("norm3", 8 * width),
    }
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        for i in range(depth):
            block = f"{names['stages']}.{stage}.blocks.{i}"
            attention = f"{block}.{names['attn']}"
            shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
            shapes |= {f"{attention}.relative_position_bias_table": ((2 * window - 1) ** 2, head)}
            shapes |= {f"{attention}.relative_position_index": (window**2, window**2)}
            shapes |= linear(f"{attention}.qkv", 3 * width, width) | linear(f"{attention}.proj", width, width)
            shapes |= linear(f"{block}.{names['fc1']}", 4 * width, width)
            shapes |= linear(f"{block}.{names['fc2']}", width, 4 * width)
        if stage < 3:
            merge = f"{names['stages']}.{stage}.downsample"
            shapes |= norm(f"{merge}.norm", 4 * width) | {f"{merge}.reduction.weight": (2 * width, 4 * width)}
        width *= 2
    return shapes


MM = {"proj": "projection", "stages": "stages", "attn": "attn.w_msa", "fc1": "ffn.layers.0.0", "fc2": "ffn.layers.1"}
D2 = {"proj": "proj", "stages": "layers", "attn": "attn", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def write(target: Any, encoder: Source, tmp_path: Path) -> tuple[dict[str, Any], str]:
    lines = target(encoder, tmp_path / "out.pth", True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.pth"]
    return torch.load(tmp_path / "out.pth", weights_only=True), "\n".join(lines)


def shapes_of(state: dict[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize(
    ("args", "positions", "with_class"),
    [
        ({}, 17, True),
        ({"init_values": 0.1}, 17, True),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, 16, False),
        ({"no_embed_class": True, "global_pool": "avg"}, 16, False),
    ],
)
@pytest.mark.parametrize("target", [to_detectron2, to_mmdet])
def test_vit_has_the_names_and_shapes_of_vitdet(
    target: Any, args: dict[str, Any], positions: int, with_class: bool, tmp_path: Path
) -> None:
    content, text = write(target, source(**args), tmp_path)
    assert shapes_of(content["model"]) == vitdet(positions)
    assert f"pretrain_use_cls_token={with_class}" in text and "pretrain_img_size=64" in text
    assert "embed_dim=48" in text and "out.pth" in text


@pytest.mark.parametrize("args", [{}, {"no_embed_class": True}])
def test_vit_has_the_names_and_shapes_of_mmsegmentation(args: dict[str, Any], tmp_path: Path) -> None:
    encoder = source(**args)
    content, text = write(to_mmseg, encoder, tmp_path)
    assert shapes_of(content["state_dict"]) == mmseg_vit()
    assert "num_layers=2" in text and "final_norm=True" in text
    assert content["meta"]["license"] == "mit" and content["meta"]["input_size"] == [3, 64, 64]
    expected = encoder.model.forward_features(IMAGES)
    torch.testing.assert_close(run_mmseg_vit(content["state_dict"], IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("target", [to_mmdet, to_mmseg])
def test_swin_has_the_names_and_shapes_of_openmmlab(target: Any, size: int, tmp_path: Path) -> None:
    content, text = write(target, source("swin_tiny_patch4_window7_224", size), tmp_path)
    assert shapes_of(content["state_dict"]) == {f"backbone.{name}": shape for name, shape in swin(MM).items()}
    assert "window_size=7" in text and "convert_weights=False" in text and "embed_dims=12" in text


@pytest.mark.parametrize("size", [64, 224])
def test_swin_has_the_names_and_shapes_of_detectron2(size: int, tmp_path: Path) -> None:
    content, text = write(to_detectron2, source("swin_tiny_patch4_window7_224", size), tmp_path)
    assert shapes_of(content["model"]) == swin(D2)
    assert "window_size=7" in text and content["matching_heuristics"] is True


def test_bias_tables_of_full_windows_are_unchanged_and_small_ones_resampled(tmp_path: Path) -> None:
    """At 64 pixels timm gives the last two stages windows of 4 and 2; a detector's are 7 everywhere."""
    encoder = source("swin_tiny_patch4_window7_224", 64)
    windows = [stage.blocks[0].attn.window_size[0] for stage in encoder.model.layers]
    assert windows == [7, 7, 4, 2]
    state = write(to_detectron2, encoder, tmp_path)[0]["model"]
    name = "layers.{}.blocks.0.attn.relative_position_bias_table"
    ours = encoder.model.state_dict()
    assert torch.equal(state[name.format(0)], ours[name.format(0)])
    small, large = ours[name.format(2)], state[name.format(2)]
    middle = large.view(13, 13, -1)[6, 6]  # no displacement: the same pair of positions in every window
    torch.testing.assert_close(middle, small.view(7, 7, -1)[3, 3], rtol=0.05, atol=0.05)
    assert encoder.model.layers[2].blocks[0].attn.window_size == (4, 4)  # the encoder itself is as it was


def test_patch_merging_with_unfold_computes_what_timm_computes(tmp_path: Path) -> None:
    encoder = source("swin_tiny_patch4_window7_224", 64)
    state = write(to_mmdet, encoder, tmp_path)[0]["state_dict"]
    x = torch.randn(2, 12, 8, 8)
    merge = "backbone.stages.0.downsample"
    rows = nn.Unfold(2, stride=2)(x).transpose(1, 2)  # [B, 16, 4 * 12]
    rows = F.layer_norm(rows, (48,), state[f"{merge}.norm.weight"], state[f"{merge}.norm.bias"])
    found = F.linear(rows, state[f"{merge}.reduction.weight"])
    expected = encoder.model.layers[1].downsample(x.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layer_scale_is_folded_without_changing_the_outputs(tmp_path: Path) -> None:
    encoder = source(init_values=0.1)
    assert encoder.model.blocks[0].ls1.gamma.std() > 0.1
    state = write(to_mmseg, encoder, tmp_path)[0]["state_dict"]
    expected = encoder.model.forward_features(IMAGES)
    torch.testing.assert_close(run_mmseg_vit(state, IMAGES), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "target", "message"),
    [
        ({"reg_tokens": 4}, to_detectron2, "has register tokens, which the backbone there cannot represent"),
        ({"qk_norm": True}, to_mmseg, "norms inside attention"),
        ({"name": "vit_small_patch16_dinov3"}, to_mmdet, "its class is Eva"),
        ({"name": "swinv2_tiny_window8_256"}, to_mmdet, "its class is SwinTransformerV2"),
        ({"class_token": False, "global_pool": "avg"}, to_mmseg, "always has a class token"),
    ],
)
def test_what_a_backbone_cannot_represent_is_refused(
    args: dict[str, Any], target: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        target(source(**args), tmp_path / "out.pth", True)
    assert not list(tmp_path.iterdir())


def test_file_names_that_no_reader_expects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.pth"):
        to_mmdet(source(), tmp_path / "out.bin", True)


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run_mmseg_vit(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """MMSegmentation's VisionTransformer in a few lines: torch's attention, tokens first, final norm."""
    weight, bias = state["patch_embed.projection.weight"], state["patch_embed.projection.bias"]
    x = F.conv2d(images, weight, bias, stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    width = x.shape[-1]
    for i in range(2):
        part = {name.removeprefix(f"layers.{i}."): v for name, v in state.items() if name.startswith(f"layers.{i}.")}
        attention = nn.MultiheadAttention(width, 3, batch_first=True).eval()
        attention.load_state_dict(
            {n.removeprefix("attn.attn."): v for n, v in part.items() if n.startswith("attn.attn.")}
        )
        y = F.layer_norm(x, (width,), part["ln1.weight"], part["ln1.bias"], 1e-6)
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(x, (width,), part["ln2.weight"], part["ln2.bias"], 1e-6)
        y = F.gelu(F.linear(y, part["ffn.layers.0.0.weight"], part["ffn.layers.0.0.bias"]))
        x = x + F.linear(y, part["ffn.layers.1.weight"], part["ffn.layers.1.bias"])
    return F.layer_norm(x, (width,), state["ln1.weight"], state["ln1.bias"], 1e-6)
