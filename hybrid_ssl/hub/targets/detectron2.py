"""Detectron2: a .pth file for its `ViT` (ViTDet, arXiv:2203.16527) and `SwinTransformer` backbones.

Its checkpointer matches keys by their ends, so none of its prefixes is needed (`backbone.net.` for ViTDet,
`backbone.bottom_up.` for Swin with FPN). What the file lacks starts there as configured: relative positions at zero,
norms of the outputs at one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from .plain import PlainViT, plain_swin, plain_vit
from .source import Source, write_tensors

_UNUSED = ("cls_token", "norm.weight", "norm.bias")  # its ViT gives the patches of the last block, before any norm


def to_detectron2(source: Source, out: Path, verify: bool) -> list[str]:
    """Write a .pth file; `verify` is for targets that can be run here."""
    swin = isinstance(source.model, SwinTransformer)
    state, arguments = swin_layout(source) if swin else vit_layout(plain_vit(source, "detectron2"))
    write_tensors({"model": state, "matching_heuristics": True, "hybrid_ssl": source.facts()}, out)
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return [
        f"{len(state)} tensors for detectron2.modeling.{'SwinTransformer' if swin else 'ViT'}({written}, ...)",
        "use it: tools/lazyconfig_train_net.py --config-file CONFIG "
        f"train.init_checkpoint='{out}?matching_heuristics=True'",
        f"in the config: model.pixel_mean={_bytes(source.mean)}, model.pixel_std={_bytes(source.std)}, RGB",
    ]


def vit_layout(vit: PlainViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, arguments of Detectron2's ViT that follow from the weights)."""
    if vit.grid[0] != vit.grid[1]:
        raise ValueError(f"--to detectron2: its ViT reads square grids of positions only, this one is {vit.grid}")
    state = {name: value for name, value in vit.state.items() if name not in _UNUSED}
    return state, {
        "patch_size": vit.patch,
        "embed_dim": vit.width,
        "depth": vit.depth,
        "num_heads": vit.heads,
        "mlp_ratio": vit.mlp_ratio,
        "qkv_bias": vit.qkv_bias,
        "pretrain_img_size": vit.patch * vit.grid[0],
        "pretrain_use_cls_token": vit.class_position,
    }


def swin_layout(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, arguments of Detectron2's SwinTransformer that follow from the weights)."""
    swin = plain_swin(source, "detectron2")
    return swin.state, {
        "patch_size": swin.patch,
        "embed_dim": swin.width,
        "depths": list(swin.depths),
        "num_heads": list(swin.heads),
        "window_size": swin.window,
        "mlp_ratio": swin.mlp_ratio,
    }


def _bytes(values: tuple[float, ...]) -> str:
    return "[" + ",".join(f"{255 * value:.2f}" for value in values) + "]"
