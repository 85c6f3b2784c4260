"""An encoder of a file into a timm model: other forms, other sizes, and nothing left open.

What is resampled follows timm: positions bicubically with antialiasing, prefix rows kept (`resample_abs_pos_embed`);
relative position tables on a geometric grid (BEiT, arXiv:2106.08254); the patch embedding by the pseudo-inverse of
resizing (FlexiViT, arXiv:2212.08013); channels of the stem repeated and scaled so that equal channels give equal sums.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from .weights import Weights, summary

TABLE = "relative_position_bias_table"
# a tensor of the file with such a name that finds no place is a part of the encoder that would be lost
_OWN = re.compile(
    r"(patch_embed|pos_embed|cls_token|reg_token|blocks|layers|norm|fc_norm|cls_norm|norm_pre|absolute_pos)\b.*"
)


def load_weights(model: Any, weights: Weights) -> list[str]:
    """Fill `model` with the encoder of a file.

    Returns:
        what was matched, resampled and ignored, as lines.

    Raises:
        ValueError: something of the encoder is missing, left over or of another shape; what, and what to do.
    """
    head = f"{model.pretrained_cfg.get('classifier')}."
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(head)}
    state, changes = dict(weights.tensors), list[str]()
    _check_size(own, weights)
    _check_rope(state, model, weights)
    _other_forms(state, own, changes)
    if "pos_embed" in state and "pos_embed" in own:
        _positions(state, own["pos_embed"], model, changes)
    _stem(state, own, changes)
    _tables(state, own, model, changes)
    _check(state, own, model, weights)
    extra = [name for name in state if name not in own]
    model.load_state_dict({name: state[name] for name in own}, strict=False)  # all but a classifier, if it has one
    taken = f", its {weights.part} (not {', '.join(weights.others)})" if weights.others else ""
    lines = [
        f"weights: {weights.path.name} ({weights.system.name}{taken}): all {len(own)} tensors of the encoder found"
    ]
    eps = weights.system.swin_eps
    if eps is not None and isinstance(model, SwinTransformer) and model.norm.eps != eps:
        changes.append(f"norms with eps {model.norm.eps} instead of {eps}, outputs differ in the 5th digit")
    if changes:
        lines.append(f"  changed: {'; '.join(changes)}")
    if weights.ignored or extra:
        lines.append(f"  ignored: {summary([*weights.ignored, *extra])}")
    return lines


def _check_rope(state: dict[str, Tensor], model: Any, weights: Weights) -> None:
    """Rotary positions are no weights for timm: ValueError when its frequencies are others than the file's."""
    theirs, rope = state.pop("rope.periods", None), getattr(model, "rope", None)
    ours = getattr(rope, "periods", None)
    if theirs is None:
        return
    # DINOv3 keeps them in bfloat16: 3 significant digits
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours.cpu(), theirs.float(), rtol=1e-2):
        raise ValueError(
            f"{weights.path} has rotary positions with other periods than {type(model).__name__}: choose one of timm's "
            "*_dinov3 models, with its number of heads, or set encoder.args.rope_temperature"
        )


def _other_forms(state: dict[str, Tensor], own: Mapping[str, Tensor], changes: list[str]) -> None:
    """From the canonical names and forms to those of `own`."""
    dropped = 0
    for name in list(state):
        if (scale := re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)) in own:
            state[scale] = state.pop(name)
        elif name.endswith(".attn.qkv.bias") and name not in own:
            dropped += _split_bias(state, own, name)
        elif name.endswith(".mlp.fc1_g.weight") and name not in own:
            for kind in ("weight", "bias"):  # one matrix, the gate first
                stem = name.removesuffix("fc1_g.weight")
                parts = [state.pop(f"{stem}fc1_{one}.{kind}") for one in "gx" if f"{stem}fc1_{one}.{kind}" in state]
                if parts:
                    state[f"{stem}fc1.{kind}"] = torch.cat(parts)
    if dropped:
        changes.append(f"{dropped} biases of attention left out, all zero")
    shared = f"rel_pos_bias.{TABLE}"
    if shared in state and shared not in own:
        places = [name for name in own if name.endswith(f"attn.{TABLE}")]
        if places:
            table = state.pop(shared)
            state.update(dict.fromkeys(places, table))
            changes.append(f"one table of relative positions given to {len(places)} blocks")


def _split_bias(state: dict[str, Tensor], own: Mapping[str, Tensor], name: str) -> int:
    """q and v of a fused bias for models whose keys have none; 1 if there is no place and it is zero."""
    stem, bias = name.removesuffix("qkv.bias"), state[name]
    query, key, value = bias.chunk(3)
    if f"{stem}q_bias" in own and not key.any():
        state[f"{stem}q_bias"], state[f"{stem}v_bias"] = query, value
        del state[name]
    elif f"{stem}q_bias" not in own and not bias.any():
        del state[name]
        return 1
    return 0


def _positions(state: dict[str, Tensor], wanted: Tensor, model: Any, changes: list[str]) -> None:
    """Rows for the prefix as the model wants them, the rest resampled to its grid."""
    table, grid = state["pos_embed"], tuple(model.patch_embed.grid_size)
    if table.ndim == 4:  # [1, D, h, w]
        old: tuple[int, int] = (table.shape[2], table.shape[3])
        table = table.flatten(2).mT
    else:
        side = math.isqrt(table.shape[1])
        old = (side, side)
    have, want = table.shape[1] - old[0] * old[1], wanted.shape[1] - grid[0] * grid[1]
    if have == 1 and want == 0 and "cls_token" in state:  # adding it once is what every pass would do
        state["cls_token"] = state["cls_token"] + table[:, :1]
        table, have = table[:, 1:], 0
        changes.append("the class token's position added to it")
    elif have < want:
        rest = table.new_zeros(1, want - have, table.shape[2])
        table, have = torch.cat([table[:, :have], rest, table[:, have:]], dim=1), want
    if old != grid:
        table = resample_abs_pos_embed(table, new_size=list(grid), old_size=list(old), num_prefix_tokens=have)
        changes.append(f"positions {old[0]} x {old[1]} resampled to {grid[0]} x {grid[1]}")
    state["pos_embed"] = table


def _stem(state: dict[str, Tensor], own: Mapping[str, Tensor], changes: list[str]) -> None:
    name = "patch_embed.proj.weight"
    if name not in state or name not in own or state[name].ndim != 4:
        return
    (_, channels, *size), (_, theirs, *old) = own[name].shape, state[name].shape
    if channels != theirs:
        state[name] = adapt_input_conv(channels, state[name], base_chans=theirs)
        changes.append(f"stem from {theirs} to {channels} channels")
    if size != old:
        state[name] = resample_patch_embed(state[name], list(size))
        changes.append(f"patches {old[0]} x {old[1]} resampled to {size[0]} x {size[1]}")


def _tables(state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, changes: list[str]) -> None:
    resized: dict[str, int] = {}
    for name, table in state.items():
        if not name.endswith(TABLE) or name not in own or table.shape[1] != own[name].shape[1]:
            continue
        window: Any = model.get_submodule(name.rpartition(".")[0]).window_size
        if table.shape == own[name].shape and window[0] == window[1]:
            continue
        state[name] = resize_rel_pos_bias_table(table, new_window_size=window, new_bias_shape=own[name].shape)
        side = (math.isqrt(table.shape[0]) + 1) // 2
        text = f"window {side} x {side} to {window[0]} x {window[1]}"
        resized[text] = resized.get(text, 0) + 1
    changes.extend(f"{count} tables of relative positions resampled from {text}" for text, count in resized.items())


def _check_size(own: Mapping[str, Tensor], weights: Weights) -> None:
    """ValueError when width or depth differ: then nothing fits, and a list of it would not help."""
    stem, ours, theirs = weights.tensors.get("patch_embed.proj.weight"), _describe(own), _describe(weights.tensors)
    if stem is None or stem.ndim != 4:
        return  # `_check` names it
    if ours.rpartition(" and ")[0] != theirs.rpartition(" and ")[0]:  # another patch size is resampled
        raise ValueError(
            f"{weights.path} ({weights.system.name}) holds a {theirs}, the encoder is a {ours}: choose the timm model "
            "of the file's size as encoder.name, or set encoder.args"
        )


def _check(state: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, weights: Weights) -> None:
    """ValueError unless the file's encoder and the model's are one."""
    missing = [name for name in own if name not in state]
    lost = [name for name in state if name not in own and _OWN.fullmatch(name)]
    if any(TABLE in name for name in lost) or any(
        name.startswith("rel_pos_bias.") and name not in own for name in state
    ):
        raise ValueError(
            f"{weights.path} ({weights.system.name}) has relative position biases, and {type(model).__name__} has no "
            "place for them: set encoder.name to one of timm's beit_* models; their patches cannot be masked or "
            "dropped, so objectives that hide patches need other weights"
        )
    shapes = [
        f"{name} {tuple(state[name].shape)}, the encoder's {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [f"missing in the file: {summary(missing)}"] if missing else []
    problems += [f"without a place in the encoder: {summary(lost)}"] if lost else []
    problems += [
        f"other shapes: {'; '.join(shapes[:3])}" + (f" and {len(shapes) - 3} more" if shapes[3:] else "")
    ] * bool(shapes)
    if problems:
        raise ValueError(
            f"{weights.path} ({weights.system.name}) does not fit the encoder, a {_describe(own)}; "
            f"{'; '.join(problems)}. Choose another encoder.name, or set or remove encoder.args, such as class_token, "
            "reg_tokens, init_values, qkv_bias, mlp_ratio"
        )


def _describe(state: Mapping[str, Tensor]) -> str:
    """Width, depth and patch of an encoder by its tensors."""
    depth = len({match[0] for name in state if (match := re.match(r"(layers\.\d+\.)?blocks\.\d+\.", name))})
    kind = "Swin" if any(name.startswith("layers.") for name in state) else "ViT"
    stem = state.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 4:
        return f"{kind} of {depth} blocks"
    return f"{kind} of width {stem.shape[0]}, {depth} blocks and patches of {stem.shape[2]} pixels"
