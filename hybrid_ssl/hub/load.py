"""Encoders come in: one name for an exported folder, a run, a Hub repository or a timm model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..encoder.official import read_weights
from ..encoder.source import create, resolve

__all__ = ["load_encoder", "resolve"]


def load_encoder(
    name: str | Path,
    *,
    init: str | Path | None = None,
    in_chans: int | None = None,
    size: int | tuple[int, int] | None = None,
    pretrained: bool = True,
    dynamic: bool = False,
    **more: Any,
) -> nn.Module:
    """A timm model, without classifier unless `num_classes` is given, in eval mode.

    Args:
        name: a folder that was exported, a run's folder (its newest export is taken), `hf-hub:user/name`, or a timm
            model name, optionally with tag.
        init: an official checkpoint file of weights for the timm model `name`.
        in_chans: channels of the images; None: those of the export. timm adapts the first convolution.
        size: height and width; None: those of the export. Positions and bias tables are resampled.
        pretrained: False: the same architecture with random weights.
        dynamic: also take images of other sizes: positions are resampled, sides padded to whole patches and windows.
        more: other arguments of `timm.create_model`, e.g. num_classes, drop_path_rate.

    Raises:
        ValueError: there is no such folder or model, it holds no encoder, or it does not fit `in_chans` or `size`.
    """
    source = resolve(name)
    if isinstance(source, Path):
        raise ValueError(f"{name} is a file of weights: load_encoder('vit_base_patch16_224', init={str(name)!r})")
    args: dict[str, Any] = {"num_classes": 0} | more
    if in_chans is not None:
        args["in_chans"] = in_chans
    weights = None if init is None else read_weights(Path(init))
    try:
        adapt = partial(_size_args, size=size, dynamic=dynamic)
        return create(source, args, adapt, pretrained=pretrained, weights=weights)[0].eval()
    except (AssertionError, KeyError, TypeError, RuntimeError, OSError, ValueError, SafetensorError) as error:
        asked = ", ".join(f"{key}={value}" for key, value in (args | {"size": size}).items() if value is not None)
        raise ValueError(f"encoder {str(name)!r} cannot be built with {asked}: {error}") from error


def _size_args(plain: nn.Module, size: int | tuple[int, int] | None, dynamic: bool) -> dict[str, Any]:
    """Arguments for families that take an image size; others take any image."""
    if not hasattr(getattr(plain, "patch_embed", None), "img_size"):
        return {}
    args: dict[str, Any] = {}
    if size is not None:
        args["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if dynamic:
        swin = hasattr(plain, "layers")
        args |= {"strict_img_size": False} if swin else {"dynamic_img_size": True, "dynamic_img_pad": True}
    return args
