"""An encoder of a checkpoint file, in timm's names, before it meets a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .files import read_tensors
from .systems import BUFFERS, STEMS, SYSTEMS, System

_QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Weights:
    """One encoder of a file.

    Attributes:
        path: the file.
        system: whose layout it has.
        part: the word for the encoder that was taken, if the file has several; others: words for the rest.
        tensors: by timm's names; qkv fused.
        ignored: names that were left out on purpose.
    """

    path: Path
    system: System
    part: str
    others: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    ignored: tuple[str, ...]

    def args_for(self, plain: nn.Module) -> dict[str, Any]:
        """Arguments of `timm.create_model` in which the file's encoder is not as `plain`, a model of the same name."""
        own = plain.state_dict()
        args: dict[str, Any] = {}
        for theirs, ours, present, absent in _FEATURES.get(type(plain), ()):
            if (theirs in self.tensors) != (ours in own):
                args |= present if theirs in self.tensors else absent
        registers, there = (
            0 if "reg_token" not in names else names["reg_token"].shape[1] for names in (self.tensors, own)
        )
        if isinstance(plain, VisionTransformer | Eva) and registers != there:
            key = "reg_tokens" if isinstance(plain, VisionTransformer) else "num_reg_tokens"
            args |= {key: registers} | ({"no_embed_class": True} if registers else {})
        if isinstance(plain, VisionTransformer):
            args |= self._vit_norms(own, args)
        if isinstance(plain, Eva) and "q_bias" not in str([*own]) and self._has_bias():
            args["qkv_bias"] = True
        return args

    def _vit_norms(self, own: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
        """Where the last norm is: behind the blocks, behind the pool, or nowhere."""
        if "norm.weight" not in self.tensors and "fc_norm.weight" not in self.tensors:
            return {"final_norm": False}
        pooled = "fc_norm.weight" in self.tensors
        if pooled == ("fc_norm.weight" in own) and "global_pool" not in args:
            return {}
        norm: dict[str, Any] = {"fc_norm": pooled}
        return norm | {"global_pool": "avg"} if pooled else norm

    def _has_bias(self) -> bool:
        return any(name.endswith("attn.qkv.bias") and bool(t.any()) for name, t in self.tensors.items())


_SCALE = ({"init_values": 1e-5}, {"init_values": None})
_CLASS = ({"class_token": True}, {"class_token": False, "global_pool": "avg"})
_TABLE = "blocks.0.attn.relative_position_bias_table"
_FEATURES: dict[type[nn.Module], tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...]] = {
    VisionTransformer: (
        ("cls_token", "cls_token", *_CLASS),
        ("blocks.0.ls1.gamma", "blocks.0.ls1.gamma", *_SCALE),
        ("blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.bias", {"qkv_bias": True}, {"qkv_bias": False}),
    ),
    Eva: (
        ("cls_token", "cls_token", *_CLASS),
        ("blocks.0.ls1.gamma", "blocks.0.gamma_1", *_SCALE),
        ("norm.weight", "norm.weight", {"use_fc_norm": False}, {}),
    ),
    Beit: (
        ("blocks.0.ls1.gamma", "blocks.0.gamma_1", *_SCALE),
        ("norm.weight", "norm.weight", {"use_fc_norm": False}, {}),
        ("fc_norm.weight", "fc_norm.weight", {"use_fc_norm": True, "global_pool": "avg"}, {}),
        ("pos_embed", "pos_embed", {"use_abs_pos_emb": True}, {"use_abs_pos_emb": False}),
        (_TABLE, _TABLE, {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}, {}),
    ),
}
"""(name in the file, name in timm's model, arguments if only the file has it, arguments if only the model has it)"""


def read_weights(path: Path, part: str | None = None) -> Weights:
    """Read a file and take one encoder out of it.

    Args:
        path: `.pth`, `.pt`, `.pth.tar`, `.bin`, `.ckpt` or `.safetensors`.
        part: which encoder of a file with several, e.g. `student`; None: the one that its authors publish.

    Raises:
        ValueError: it cannot be read, is of no known layout, or has no such part.
    """
    tensors = read_tensors(path)
    keys = "\n".join(tensors)
    system = next((system for system in SYSTEMS if system.recognises(keys)), None)
    ways = list(dict.fromkeys(match["way"] for key in tensors if (match := STEMS.fullmatch(key))))
    if system is None or not ways:
        raise ValueError(
            f"{path} has no encoder in a known layout; it begins with {', '.join(list(tensors)[:4])}. Known: "
            f"{', '.join(known.name for known in SYSTEMS)}"
        )
    way = _choose(path, ways, system.parts, part)
    chosen, ignored = {}, []
    for key, tensor in tensors.items():
        name = key.removeprefix(way)
        if not key.startswith(way) or re.fullmatch(f"{BUFFERS}|{system.ignored}", _renamed(name, system)):
            ignored.append(re.sub(r"^(model|state_dict)\.", "", key))
        else:
            chosen[_renamed(name, system)] = tensor
    others = tuple(_word(other) for other in ways if other != way)
    return Weights(path, system, _word(way), others, _canonical(chosen), tuple(ignored))


def _word(way: str) -> str:
    """What an encoder is called by the words on the way to it."""
    words = [word for word in way.split(".") if word and word not in ("model", "state_dict")]
    return words[0] if words else "encoder"


def _choose(path: Path, ways: list[str], parts: Iterable[str], part: str | None) -> str:
    wanted = [part] if part else [*parts]
    for word in wanted:
        for way in ways:
            if word in way.split("."):
                return way
    if len(ways) == 1 and part is None:
        return ways[0]
    raise ValueError(
        f"{path} holds the encoders {', '.join(map(_word, ways))}"
        + (f", none is called {part!r}: set encoder.init_part to one" if part else ": set encoder.init_part to one")
    )


def _renamed(name: str, system: System) -> str:
    for pattern, replacement in system.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _canonical(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused qkv with all three biases, `ls1.gamma`, Swin's merging at the start of a stage, as timm has it."""
    old_swin = "layers.0.downsample.reduction.weight" in tensors  # at the end of the stage before
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if old_swin:
            name = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        name = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        if f"{name.removesuffix('fc1.weight').removesuffix('fc1.bias')}fc1_g.weight" in tensors:
            name = name.replace(".fc1.", ".fc1_x.")
        out[name] = tensor
    for name in [name for name in out if name.endswith((".bias_mask", ".qkv.bias_mask"))]:
        mask = out.pop(name)
        bias = name.removesuffix("_mask")
        out[bias] = torch.where(mask != 0, out[bias], 0)  # DINOv3 multiplies in every pass
    for stem in {name.rpartition("attn.")[0] + "attn." for name in out if ".attn." in name}:
        _fuse(out, stem)
    return out


def _fuse(tensors: dict[str, Tensor], stem: str) -> None:
    """q, k, v of the attention at `stem` into one matrix and one bias; a bias that the layout has not is zero."""
    split = [tensors.pop(f"{stem}{one}_proj.weight", None) for one in _QKV]
    weights = [weight for weight in split if weight is not None]
    if len(weights) == 3:
        tensors[f"{stem}qkv.weight"] = torch.cat(weights)
    biases = [tensors.pop(f"{stem}{one}_proj.bias", tensors.pop(f"{stem}{one}_bias", None)) for one in _QKV]
    known = next((bias for bias in biases if bias is not None), None)
    if known is not None:
        zeros = torch.zeros_like(known)
        tensors[f"{stem}qkv.bias"] = torch.cat([zeros if bias is None else bias for bias in biases])


def summary(names: Iterable[str]) -> str:
    """Names in a line: what they begin with, and how many do."""
    counts = Counter(re.sub(r"\.\d+\..*|\.(weight|bias)$", "", name) for name in names)
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.most_common(12)]
    return ", ".join(shown) + (f" and {len(counts) - 12} more" if len(counts) > 12 else "")
