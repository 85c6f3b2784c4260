"""Where an encoder comes from: one meaning for a name everywhere, and one way to build what it names.

vit_base_patch16_224.mae       a timm model, optionally with the tag of its weights
hf-hub:user/name               a repository of the Hub that timm can load
./runs/mine, ./runs/x/encoder  a run's folder (its newest export is taken), or an exported folder
./mae_pretrain_vit_base.pth    a checkpoint file of one of the systems in `official`
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..exported import find_export
from .official import SUFFIXES, Weights, load_weights


def resolve(name: str | Path) -> str | Path:
    """What timm calls the model behind `name`: `local-dir:...`, `hf-hub:...` or a model name; or a checkpoint file.

    Raises:
        ValueError: no such thing; what is similar, or what is missing.
    """
    text = str(name)
    if text.startswith("hf-hub:"):
        return text
    place = Path(text.removeprefix("local-dir:")).expanduser()
    if place.is_dir():
        return f"local-dir:{find_export(place)}"
    if place.is_file():
        return place
    if place.suffix in SUFFIXES:
        raise ValueError(f"checkpoint file {text!r} does not exist")
    if isinstance(name, Path) or text.startswith(("local-dir:", "/", "~", ".")):
        raise ValueError(f"encoder folder {text!r} does not exist: give an exported folder, or a run's folder")
    if timm.is_model(text.split(".")[0]):
        return text
    near = difflib.get_close_matches(text, timm.list_models(), n=5, cutoff=0.5)
    hub = f"for the Hub write 'hf-hub:{text}'; " if re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", text) else ""
    raise ValueError(
        f"encoder {text!r} is no folder, no file and no model of timm {timm.__version__}; {hub}"
        f"similar names: {', '.join(near) or 'none'}"
    )


def create(
    name: str,
    args: Mapping[str, Any],
    adapt: Callable[[nn.Module], Mapping[str, Any]],
    *,
    pretrained: bool = False,
    weights: Weights | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """timm's own factory, with the arguments that the family and the weights take.

    Args:
        name: as timm calls the model.
        args: of `timm.create_model`; they count more than all others.
        adapt: more arguments for a model of this kind, by a model without memory.
        pretrained: with the weights that timm finds by the name.
        weights: of a checkpoint file, instead.

    Returns:
        the model, and what there is to say of its weights.

    Raises:
        ValueError: the weights do not fit; and whatever timm raises.
    """
    with torch.device("meta"):  # costs nothing; says which family it is
        plain = timm.create_model(name, **args)
    found = {} if weights is None else weights.args_for(plain)
    found = {key: value for key, value in found.items() if key not in args}
    model: Any = timm.create_model(name, pretrained=pretrained and weights is None, **{**adapt(plain), **found, **args})
    if weights is None:
        return model, (f"weights: {_spoken(name)}",) if pretrained else ()
    lines = load_weights(model, weights)
    if found:
        lines.insert(1, f"  encoder.args as in the file: {', '.join(f'{key}={value}' for key, value in found.items())}")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": weights.system.mean, "std": weights.system.std, "tag": ""}
    return model, tuple(lines)


def _spoken(name: str) -> str:
    published = None if ":" in name else timm.get_pretrained_cfg(name)
    return name if published is None or "." in name or not published.tag else f"{name}.{published.tag}"
