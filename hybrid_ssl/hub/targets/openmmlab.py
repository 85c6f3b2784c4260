"""MMDetection and MMSegmentation: a .pth file for their backbones, used as `init_cfg=dict(type='Pretrained', ...)`.

Swin (both): keys below `backbone.`, without which MMDetection ignores them; patch merging in the order of `nn.Unfold`,
which puts the channel first. ViT: MMDetection has Detectron2's layout (its project ViTDet), MMSegmentation has one of
its own (`VisionTransformer`), whose attention is torch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from . import detectron2
from .plain import PlainViT, plain_swin, plain_vit
from .source import Source, write_tensors

_SWIN = {
    "layers.": "stages.",
    ".attn.": ".attn.w_msa.",
    ".mlp.fc1.": ".ffn.layers.0.0.",
    ".mlp.fc2.": ".ffn.layers.1.",
    "patch_embed.proj.": "patch_embed.projection.",
}
_VIT = {
    "blocks.": "layers.",
    ".norm1.": ".ln1.",
    ".norm2.": ".ln2.",
    ".attn.qkv.": ".attn.attn.in_proj_",
    ".attn.proj.": ".attn.attn.out_proj.",
    ".mlp.fc1.": ".ffn.layers.0.0.",
    ".mlp.fc2.": ".ffn.layers.1.",
    "patch_embed.proj.": "patch_embed.projection.",
}


def to_mmdet(source: Source, out: Path, verify: bool) -> list[str]:
    """Write a .pth file for MMDetection; `verify` is for targets that can be run here."""
    if isinstance(source.model, SwinTransformer):
        return _write_swin(source, out, "mmdet")
    state, arguments = detectron2.vit_layout(plain_vit(source, "mmdet"))
    for name in ("pretrain_img_size", "pretrain_use_cls_token"):
        arguments[name] = arguments.pop(name)
    write_tensors({"model": state, "meta": source.facts()}, out)
    return _how(out, source, "ViT", arguments, "config: projects/ViTDet, custom_imports=['projects.ViTDet.vitdet']")


def to_mmseg(source: Source, out: Path, verify: bool) -> list[str]:
    """Write a .pth file for MMSegmentation; `verify` is for targets that can be run here."""
    if isinstance(source.model, SwinTransformer):
        return _write_swin(source, out, "mmseg")
    vit = plain_vit(source, "mmseg")
    state, arguments = mmseg_vit_layout(vit)
    write_tensors({"state_dict": state, "meta": source.facts()}, out)
    return _how(out, source, "VisionTransformer", arguments, "config: configs/vit")


def swin_layout(source: Source, target: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, arguments of SwinTransformer, the same class in both libraries)."""
    swin = plain_swin(source, target)
    state = {}
    for name, value in swin.state.items():
        if ".downsample." in name:
            value = _unfold_order(value)
        state["backbone." + _renamed(name, _SWIN)] = value
    return state, {
        "in_channels": source.size[0],
        "patch_size": swin.patch,
        "embed_dims": swin.width,
        "depths": swin.depths,
        "num_heads": swin.heads,
        "window_size": swin.window,
        "mlp_ratio": swin.mlp_ratio,
        "convert_weights": False,
    }


def mmseg_vit_layout(vit: PlainViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, arguments of MMSegmentation's VisionTransformer).

    It always adds a class token, so an encoder without one would compute something else.
    """
    if "cls_token" not in vit.state:
        raise ValueError("--to mmseg: its VisionTransformer always has a class token, and this encoder has none")
    state = {_renamed(name, _VIT): value for name, value in vit.state.items() if not name.startswith("norm.")}
    for end in ("weight", "bias"):
        if f"norm.{end}" in vit.state:
            state[f"ln1.{end}"] = vit.state[f"norm.{end}"]
    if not vit.class_position:
        state["pos_embed"] = torch.cat([torch.zeros_like(vit.state["cls_token"]), state["pos_embed"]], dim=1)
    return state, {
        "img_size": (vit.patch * vit.grid[0], vit.patch * vit.grid[1]),
        "patch_size": vit.patch,
        "in_channels": vit.state["patch_embed.proj.weight"].shape[1],
        "embed_dims": vit.width,
        "num_layers": vit.depth,
        "num_heads": vit.heads,
        "mlp_ratio": int(vit.mlp_ratio),
        "qkv_bias": vit.qkv_bias,
        "norm_cfg": {"type": "LN", "eps": 1e-6},
        "final_norm": "ln1.weight" in state,
    }


def _write_swin(source: Source, out: Path, target: str) -> list[str]:
    state, arguments = swin_layout(source, target)
    write_tensors({"state_dict": state, "meta": source.facts()}, out)
    return _how(out, source, "SwinTransformer", arguments, "config: configs/swin")


def _how(out: Path, source: Source, kind: str, arguments: dict[str, Any], where: str) -> list[str]:
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    mean, std = ([round(255 * value, 3) for value in values] for values in (source.mean, source.std))
    return [
        f"in the config: backbone=dict(type={kind!r}, {written},",
        f"    init_cfg=dict(type='Pretrained', checkpoint={str(out)!r}))",
        f"    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb={source.size[0] == 3})",
        where,
    ]


def _renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs, 1)
    return name


def _unfold_order(value: Tensor) -> Tensor:
    """Inputs of patch merging [..., 4 * C]: from (column, row, channel) to `nn.Unfold`'s (channel, row, column)."""
    shape = value.shape
    return value.unflatten(-1, (2, 2, -1)).transpose(-3, -2).movedim(-1, -3).reshape(shape)
