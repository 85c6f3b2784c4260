"""ViT and Swin in the key layout of their first publications, which other libraries rename from.

ViT (arXiv:2010.11929, keys as in DeiT and MAE), Swin (arXiv:2103.14030, keys as in its repository). Parts that the
plain networks lack are computed away where that changes nothing (LayerScale goes into the layer before it), and
refused where it would (registers, normalised queries, rotary positions).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from timm.layers import LayerScale, PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .source import Source


class PlainViT(NamedTuple):
    """A Vision Transformer, and what a program must be told to build it."""

    state: dict[str, Tensor]
    patch: int
    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    qkv_bias: bool
    class_position: bool
    """whether the first row of `pos_embed` belongs to the class token"""


class PlainSwin(NamedTuple):
    """A Swin Transformer, with one window size in all stages."""

    state: dict[str, Tensor]
    patch: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp_ratio: float
    resized: int
    """bias tables that were resampled to `window`"""


def plain_vit(source: Source, target: str) -> PlainViT:
    """The encoder as a plain ViT; ValueError if it is none."""
    model = source.model
    _refuse(target, source, _what_is_not_plain(model))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(("fc_norm.", "head."))}
    for index, block in enumerate(model.blocks):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if isinstance(getattr(block, scale), LayerScale):
                gamma = state.pop(f"blocks.{index}.{scale}.gamma")
                _scale(state, f"blocks.{index}.{layer}", gamma)
    block, prefix = model.blocks[0], model.num_prefix_tokens
    grid = model.patch_embed.grid_size
    return PlainViT(
        state,
        patch=int(model.patch_embed.patch_size[0]),
        grid=(int(grid[0]), int(grid[1])),
        width=int(model.embed_dim),
        depth=len(model.blocks),
        heads=int(block.attn.num_heads),
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=block.attn.qkv.bias is not None,
        class_position=bool(prefix) and not model.no_embed_class,
    )


def plain_swin(source: Source, target: str) -> PlainSwin:
    """The encoder with Swin's keys, bias tables resampled to the largest window; ValueError if it is no Swin."""
    if type(source.model) is not SwinTransformer:
        raise ValueError(f"--to {target}: {source.name} is no Swin Transformer of the first version")
    model: Any = copy.deepcopy(source.model)
    attentions = [block.attn for stage in model.layers for block in stage.blocks]
    window = max(side for attention in attentions for side in attention.window_size)
    # timm shrinks the windows of late stages to the feature map; a detector's maps are larger
    small = [attention for attention in attentions if attention.window_size != (window, window)]
    for attention in small:
        attention.set_window_size((window, window))
    last = len(model.layers) - 1
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "norm":
            parts[0] = f"norm{last}"
        elif parts[2:3] == ["downsample"]:  # timm: before the stage, elsewhere: behind the one before
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    for depth, stage in enumerate(model.layers):
        for index, block in enumerate(stage.blocks):
            state[f"layers.{depth}.blocks.{index}.attn.relative_position_index"] = block.attn.relative_position_index
    return PlainSwin(
        state,
        patch=int(model.patch_embed.patch_size[0]),
        width=int(model.embed_dim),
        depths=tuple(len(stage.blocks) for stage in model.layers),
        heads=tuple(int(stage.blocks[0].attn.num_heads) for stage in model.layers),
        window=window,
        mlp_ratio=model.layers[0].blocks[0].mlp.fc1.out_features / model.embed_dim,
        resized=len(small),
    )


def _what_is_not_plain(model: Any) -> list[str]:
    if type(model) is not VisionTransformer:
        return [f"its class is {type(model).__name__}"]
    block: Any = model.blocks[0]
    inner = (getattr(block.attn, "q_norm", None), getattr(block.attn, "norm", None), getattr(block.mlp, "norm", None))
    problems = {
        "register tokens": model.num_reg_tokens > 0,
        "blocks of another kind": any(type(each) is not Block for each in model.blocks),
        "another patch embedding": type(model.patch_embed) is not PatchEmbed
        or not isinstance(model.patch_embed.norm, nn.Identity),
        "a norm before the blocks": not isinstance(model.norm_pre, nn.Identity),
        "norms inside attention or MLP": any(not isinstance(norm, nn.Identity | None) for norm in inner),
        "another activation than GELU": type(block.mlp.act) is not nn.GELU,
        "no absolute positions": getattr(model, "pos_embed", None) is None,
    }
    return [text for text, found in problems.items() if found]


def _refuse(target: str, source: Source, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"--to {target}: {source.name} is no plain ViT, it has {', '.join(problems)}, which the backbone there "
            "cannot represent; --to onnx or torch-export takes it as it is"
        )


def _scale(state: dict[str, Tensor], layer: str, gamma: Tensor) -> None:
    """Multiply the outputs of a linear layer by `gamma` [D]."""
    state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma.unsqueeze(1)
    if f"{layer}.bias" in state:
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * gamma
