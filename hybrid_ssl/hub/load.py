"""Encoders come in: one name for an exported folder, a run, a Hub repository or a timm model."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from .folder import find_export


def load_encoder(
    name: str | Path,
    *,
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
        in_chans: channels of the images; None: those of the export. timm adapts the first convolution.
        size: height and width; None: those of the export. Positions and bias tables are resampled.
        pretrained: False: the same architecture with random weights.
        dynamic: also take images of other sizes: positions are resampled, sides padded to whole patches and windows.
        more: other arguments of `timm.create_model`, e.g. num_classes, drop_path_rate.

    Raises:
        ValueError: there is no such folder or model, it holds no encoder, or it does not fit `in_chans` or `size`.
    """
    source = resolve(name)
    args: dict[str, Any] = {"num_classes": 0} | more
    if in_chans is not None:
        args["in_chans"] = in_chans
    try:
        if size is not None or dynamic:
            with torch.device("meta"):  # which families take an image size: costs nothing
                plain = timm.create_model(source, **args)
            takes_size = hasattr(getattr(plain, "patch_embed", None), "img_size")
            if size is not None and takes_size:
                args["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
            if dynamic and takes_size:
                swin = hasattr(plain, "layers")
                args |= {"strict_img_size": False} if swin else {"dynamic_img_size": True, "dynamic_img_pad": True}
        return timm.create_model(source, pretrained=pretrained, **args).eval()
    except (AssertionError, KeyError, TypeError, RuntimeError, OSError, ValueError, SafetensorError) as error:
        asked = ", ".join(f"{key}={value}" for key, value in args.items())
        raise ValueError(f"encoder {str(name)!r} cannot be built with {asked}: {error}") from error


def resolve(name: str | Path) -> str:
    """What timm calls the model behind `name`: `local-dir:...`, `hf-hub:...` or a model name.

    Raises:
        ValueError: no such thing; what is similar, or what is missing.
    """
    text = str(name)
    if text.startswith("hf-hub:"):
        return text
    folder = Path(text.removeprefix("local-dir:")).expanduser()
    if folder.is_dir():
        return f"local-dir:{find_export(folder)}"
    if isinstance(name, Path) or text.startswith(("local-dir:", "/", "~", ".")):
        raise ValueError(f"encoder folder {text!r} does not exist: give an exported folder, or a run's folder")
    if timm.is_model(text.split(".")[0]):
        return text
    near = difflib.get_close_matches(text, timm.list_models(), n=5, cutoff=0.5)
    hub = f"for the Hub write 'hf-hub:{text}'; " if re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", text) else ""
    raise ValueError(
        f"encoder {text!r} is no folder and no model of timm {timm.__version__}; {hub}"
        f"similar names: {', '.join(near) or 'none'}"
    )
