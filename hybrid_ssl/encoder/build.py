"""From a recipe's section to an encoder: timm's factory, initialisation, and sizes that must fit."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..nn.sincos import sincos_2d
from ..settings import EncoderSettings
from .base import Encoder
from .official import read_weights
from .source import create, resolve
from .swin import SwinEncoder
from .vit import VitEncoder


def build_encoder(
    cfg: EncoderSettings,
    *,
    in_chans: int,
    sizes: Mapping[str, tuple[int, int]],
    native: tuple[int, int] | None = None,
) -> Encoder:
    """Build the student of a recipe.

    Args:
        cfg: the recipe's section.
        in_chans: channels of the images.
        sizes: view -> (height, width).
        native: the model's image size; None: the largest of `sizes`.

    Raises:
        ValueError: timm does not know the name, or a size does not fit the patches or windows.
    """
    largest = native or max(sizes.values(), key=lambda size: size[0] * size[1])
    model, origin = _create(cfg, in_chans, largest, several=len(set(sizes.values())) > 1)
    _refuse_dropout(model)
    if cfg.init is None:
        _initialise(model, cfg.scheme)
    encoder = wrap(model)
    encoder.origin = origin
    rows, columns = encoder.grid(*largest)
    if isinstance(encoder, SwinEncoder):
        encoder.check_windows(*largest)
    if cfg.position == "sincos":
        _fix_positions(model, rows, columns)
    if cfg.freeze_patch_embed:
        model.get_submodule("patch_embed").requires_grad_(False)
    return encoder


def load_frozen(weights: str, *, in_chans: int, size: tuple[int, int], name: str | None = None) -> Encoder:
    """A trained encoder that is only to be looked with.

    Args:
        weights: anything that `resolve` knows.
        in_chans: channels of the images.
        size: height and width that its positions are resampled to.
        name: the timm model that a checkpoint file is for.

    Raises:
        ValueError: there is no such model, or the size does not fit it.
    """
    cfg = EncoderSettings(name=name or weights, init=weights)
    return build_encoder(cfg, in_chans=in_chans, sizes={"frozen": size})


def wrap(model: nn.Module) -> Encoder:
    """The `Encoder` for a timm model's family."""
    if isinstance(model, VisionTransformer | Eva):
        return VitEncoder(model)
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        return SwinEncoder(model)
    return Encoder(model)


def _create(cfg: EncoderSettings, in_chans: int, size: tuple[int, int], several: bool) -> tuple[Any, tuple[str, ...]]:
    """The model without classifier, and what there is to say of its weights."""
    source = None if cfg.init is None else cfg.name if cfg.init == "timm" else resolve(cfg.init)
    file = source if isinstance(source, Path) else None
    if cfg.init_part and file is None:
        raise ValueError("encoder.init_part chooses an encoder of a checkpoint file: set encoder.init to one, or null")
    name = source if isinstance(source, str) else cfg.name
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(_unknown(name))
    if ":" not in name:
        _refuse_other_kind(cfg, name.split(".")[0])
    args: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans} | cfg.args
    if cfg.drop_path:
        args["drop_path_rate"] = cfg.drop_path
    weights = None if file is None else read_weights(file, cfg.init_part)
    fresh = cfg.init is None
    try:
        model, lines = create(
            name,
            args,
            lambda plain: _family_args(plain, size, several, fresh),
            pretrained=not fresh,
            weights=weights,
        )
    except (TypeError, AssertionError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"encoder: timm cannot build {name!r} with {args}: {error}") from error
    if ":" in name:
        _refuse_other_kind(cfg, model.pretrained_cfg["architecture"])
    return model, lines


def _refuse_other_kind(cfg: EncoderSettings, held: str) -> None:
    if cfg.name not in (cfg.init, held) and cfg.name.split(".")[0] != held:
        raise ValueError(f"encoder.init {cfg.init!r} holds a {held}, not a {cfg.name}: set encoder.name={held}")


def _unknown(name: str) -> str:
    if Path(name).is_file():
        return f"{name} is a file of weights: say which timm model they are for by `name`, e.g. vit_base_patch16_224"
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
    return f"encoder.name: timm {timm.__version__} has no model {name!r}; similar: {', '.join(near)}"


def _family_args(plain: nn.Module, size: tuple[int, int], several: bool, fresh: bool) -> dict[str, Any]:
    if isinstance(plain, Beit):
        return {"img_size": size}  # its tables of relative positions are for one size
    if isinstance(plain, SwinTransformer | SwinTransformerV2):
        # timm's Swin has a rate of 0.1 of its own; smaller crops than its size: windows are padded, as timm does
        return {"img_size": size, "drop_path_rate": 0.0} | ({"strict_img_size": False} if several else {})
    if not isinstance(plain, VisionTransformer | Eva):
        return {}
    args: dict[str, Any] = {"img_size": size, "dynamic_img_size": True}
    if plain.attn_pool is not None:
        args["global_pool"] = "avg"  # an attention pool has no gradient under masked objectives
    if fresh and (plain.attn_pool is not None or isinstance(plain.norm, nn.Identity)):
        # the last norm before the pool, so that every objective trains it
        args["use_fc_norm" if isinstance(plain, Eva) else "fc_norm"] = False
    return args


def _refuse_dropout(model: nn.Module) -> None:
    """Dropout draws from a global random stream: a resumed run would differ. Stochastic depth does not."""
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    drops_patches = not isinstance(getattr(model, "patch_drop", None) or nn.Identity(), nn.Identity)
    if any(rates) or drops_patches:
        raise ValueError(
            "encoder.args: dropout rates must be 0 in pretraining; use encoder.drop_path and masks instead"
        )


@torch.no_grad()
def _initialise(model: nn.Module, scheme: str) -> None:
    """`mae`: arXiv:2111.06377; `moco`: arXiv:2104.02057, which treats q, k and v as matrices of their own."""
    if scheme == "timm":
        return
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"encoder.scheme: {scheme!r} is for timm VisionTransformers, not {type(model).__name__}: use timm"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            fan_out = module.out_features // (3 if scheme == "moco" and name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (module.in_features + fan_out))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    stem = model.patch_embed.proj
    bound = math.sqrt(6 / (stem.weight[0].numel() + stem.out_channels))
    nn.init.uniform_(stem.weight, -bound, bound)
    if scheme == "moco" and stem.bias is not None:
        nn.init.zeros_(stem.bias)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=0.02 if scheme == "mae" else 1e-6)


def _fix_positions(model: nn.Module, rows: int, columns: int) -> None:
    """Write the fixed sine-cosine table into timm's own position parameter; prefix tokens get zeros."""
    positions = getattr(model, "pos_embed", None)
    if not isinstance(model, VisionTransformer) or positions is None:
        raise ValueError(f"encoder.position: {type(model).__name__} has no absolute positions to replace: use timm")
    table = sincos_2d(positions.shape[-1], (rows, columns))  # [N, D]
    with torch.no_grad():
        positions.zero_()
        positions[0, positions.shape[1] - rows * columns :] = table.to(positions.dtype)
    positions.requires_grad_(False)
