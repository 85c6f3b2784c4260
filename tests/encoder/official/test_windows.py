"""Relative positions: Swin of SimMIM and iBOT, BEiT and SimMIM's ViT, in official names."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.encoder.official.reference import (
    DEPTH,
    DIM,
    HEADS,
    State,
    attend,
    dense,
    layer_norm,
    linear,
    norm,
    patches,
    random_state,
    under,
    vit_shapes,
    window_index,
)
from tests.encoder.official.test_vits import assert_equal, double, images, load, save

SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "patch_size": 2, "window_size": 4}
NAME = "swin_tiny_patch4_window7_224"


def swin_shapes(window: int = 4) -> dict[str, tuple[int, ...]]:
    """Two stages of two blocks; patches are merged at the end of the first, as the official Swin has it."""
    shapes = {"patch_embed.proj.weight": (12, 3, 2, 2), "patch_embed.proj.bias": (12,)} | norm("patch_embed.norm", 12)
    for stage, dim in enumerate((12, 24)):
        for block in range(2):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim) | linear(f"{name}.attn.qkv", 3 * dim, dim)
            shapes |= linear(f"{name}.attn.proj", dim, dim) | linear(f"{name}.mlp.fc1", 4 * dim, dim)
            shapes |= linear(f"{name}.mlp.fc2", dim, 4 * dim)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, SWIN["num_heads"][stage])
    return (
        shapes
        | norm("layers.0.downsample.norm", 48)
        | {"layers.0.downsample.reduction.weight": (24, 48)}
        | norm("norm", 24)
    )


def swin(s: State, x: Tensor, eps: float, window: int = 4) -> Tensor:
    """Attention by a mask over all tokens of the rolled image: same window, and the same side of the seam."""
    side = x.shape[-1] // 2
    x = layer_norm(s, "patch_embed.norm", patches(s, "patch_embed.proj", x), eps)
    for stage, heads in enumerate(SWIN["num_heads"]):
        for block in range(2):
            shift = window // 2 if block and side > window else 0
            x = swin_block(s, f"layers.{stage}.blocks.{block}", x, side, window, heads, shift, eps)
        if stage == 0:
            grid = x.unflatten(1, (side, side))
            quarters = [grid[:, i::2, j::2] for j in range(2) for i in range(2)]
            merged = layer_norm(s, "layers.0.downsample.norm", torch.cat(quarters, -1).flatten(1, 2), eps)
            x, side = merged @ s["layers.0.downsample.reduction.weight"].mT, side // 2
    return layer_norm(s, "norm", x, eps)


def swin_block(s: State, name: str, x: Tensor, side: int, window: int, heads: int, shift: int, eps: float) -> Tensor:
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    rolled = (at - shift) % side  # where a token is after the roll
    same = (rolled[:, None] // window == rolled[None] // window).all(-1)
    if shift:  # tokens that came around the edge do not see their new neighbours
        same &= ((at[:, None] < shift) == (at[None] < shift)).all(-1)
    index = window_index(window)
    inside = rolled % window
    own = inside[:, 0] * window + inside[:, 1]
    bias = s[f"{name}.attn.relative_position_bias_table"][index[own[:, None], own[None]]].permute(2, 0, 1)
    bias = bias.masked_fill(~same, -torch.inf)
    q, k, v = dense(s, f"{name}.attn.qkv", layer_norm(s, f"{name}.norm1", x, eps)).chunk(3, -1)
    x = x + dense(s, f"{name}.attn.proj", attend(q, k, v, heads, bias))
    y = layer_norm(s, f"{name}.norm2", x, eps)
    return x + dense(s, f"{name}.mlp.fc2", F.gelu(dense(s, f"{name}.mlp.fc1", y)))


def simmim_file(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SimMIM's files hold the run's configuration, an object of the package yacs, which is not installed here."""
    module, package = ModuleType("yacs.config"), ModuleType("yacs")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module.CfgNode = node  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yacs", package)
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = node(MODEL=node(TYPE="swin"))
    config.frozen = True
    buffers = {"encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    buffers |= {"encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    decoder = random_state({"decoder.0.weight": (12, 24, 1, 1), "decoder.0.bias": (12,)}, 3)
    model = under("encoder.", state) | {"encoder.mask_token": torch.zeros(1, 1, 12)} | buffers | decoder
    file = save(tmp_path, {"model": model, "config": config, "lr_scheduler": {"last_epoch": 3}})
    monkeypatch.delitem(sys.modules, "yacs")
    monkeypatch.delitem(sys.modules, "yacs.config")
    return file


def test_simmim_swin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(swin_shapes(), 1)
    encoder = load(simmim_file(tmp_path, state, monkeypatch), NAME, size=32, args=SWIN)
    assert_equal(encoder, swin(double(state), images(32), 1e-5), size=32)
    assert "(SimMIM)" in encoder.origin[0] and "layers (2), decoder (2), encoder.mask_token" in encoder.origin[-1]


def test_ibot_swin_teacher_with_its_own_norm(tmp_path: Path) -> None:
    state, other = random_state(swin_shapes(), 1), random_state(swin_shapes(), 2)
    student = under("module.backbone.", other | {"masked_embed": torch.zeros(1, 12)})
    encoder = load(save(tmp_path, {"student": student, "teacher": under("backbone.", state)}), NAME, size=32, args=SWIN)
    assert_equal(encoder, swin(double(state), images(32), 1e-5), size=32)
    assert_equal(encoder, swin(double(state), images(32), 1e-6), size=32, tolerance=1e-3)  # timm's eps is another
    assert "eps 1e-05 instead of 1e-06" in encoder.origin[1] and "teacher (not student)" in encoder.origin[0]


def test_swin_tables_are_resized_to_another_window(tmp_path: Path) -> None:
    """A table that is constant stays so; one that is linear in the distance is linear near the middle."""
    state = random_state(swin_shapes(window=6), 1)
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    state[table] = torch.full_like(state[table], 0.7)
    encoder = load(save(tmp_path, state), NAME, size=32, args=SWIN)
    resized = encoder.model.get_parameter(table)
    torch.testing.assert_close(resized, torch.full((49, 2), 0.7, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert "4 tables of relative positions resampled from window 6 x 6 to 4 x 4" in encoder.origin[1]


def beit_shapes(shared: bool) -> dict[str, tuple[int, ...]]:
    shapes = vit_shapes()
    del shapes["pos_embed"]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        del shapes[f"{name}.attn.qkv.bias"]
        shapes |= {f"{name}.attn.{kind}_bias": (DIM,) for kind in "qv"} | {f"{name}.gamma_{k}": (DIM,) for k in (1, 2)}
        if not shared:
            shapes[f"{name}.attn.relative_position_bias_table"] = (7 * 7 + 3, HEADS)
    return shapes | ({"rel_pos_bias.relative_position_bias_table": (7 * 7 + 3, HEADS)} if shared else {})


def beit(s: State, x: Tensor) -> Tensor:
    """Three rows of a table are for the class token: to patches, from patches, to itself."""
    x = patches(s, "patch_embed.proj", x)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1)
    index = torch.full((17, 17), 7 * 7, dtype=torch.long)
    index[1:, 0], index[0, 0], index[1:, 1:] = 7 * 7 + 1, 7 * 7 + 2, window_index(4)
    for i in range(DEPTH):
        name = f"blocks.{i}"
        table = s.get("rel_pos_bias.relative_position_bias_table")
        table = s[f"{name}.attn.relative_position_bias_table"] if table is None else table
        y = layer_norm(s, f"{name}.norm1", x)
        q, k, v = (y @ s[f"{name}.attn.qkv.weight"].mT).chunk(3, -1)
        q, v = q + s[f"{name}.attn.q_bias"], v + s[f"{name}.attn.v_bias"]
        mixed = attend(q, k, v, HEADS, table[index].permute(2, 0, 1))
        x = x + s[f"{name}.gamma_1"] * dense(s, f"{name}.attn.proj", mixed)
        y = F.gelu(dense(s, f"{name}.mlp.fc1", layer_norm(s, f"{name}.norm2", x)))
        x = x + s[f"{name}.gamma_2"] * dense(s, f"{name}.mlp.fc2", y)
    return layer_norm(s, "norm", x)


BEIT = {"patch_size": 4, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


@pytest.mark.parametrize("shared", [True, False])
def test_beit_with_shared_and_own_tables(shared: bool, tmp_path: Path) -> None:
    state = random_state(beit_shapes(shared), 1)
    more = random_state(linear("lm_head", 8, DIM), 3) | {"mask_token": torch.zeros(1, 1, DIM)}
    encoder = load(save(tmp_path, {"model": state | more}), "beit_base_patch16_224", args=BEIT)
    tokens = encoder.model.forward_features(images())
    torch.testing.assert_close(tokens, beit(double(state), images()), rtol=1e-10, atol=1e-10)
    assert "(BEiT)" in encoder.origin[0] and encoder.mean_std[0] == [0.5, 0.5, 0.5]


def test_simmim_vit_is_a_beit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(beit_shapes(shared=True), 1)
    file = simmim_file(tmp_path, state, monkeypatch)
    encoder = load(file, "beit_base_patch16_224", args=BEIT)
    torch.testing.assert_close(encoder.model.forward_features(images()), beit(double(state), images()))
    assert "(SimMIM)" in encoder.origin[0]
    with pytest.raises(ValueError, match=r"VisionTransformer has no place for them: set encoder.name to .* beit_\*"):
        load(file)
