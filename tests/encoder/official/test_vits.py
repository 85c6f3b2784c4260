"""Checkpoints with official names give encoders with the outputs that these names mean: plain ViTs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.encoder import Encoder, EncoderSettings, build_encoder
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
    vit,
    vit_shapes,
)

SMALL = {"patch_size": 4, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


def load(file: Path, name: str = "vit_tiny_patch16_224", size: int = 16, channels: int = 3, **more: Any) -> Encoder:
    args = more.pop("args", SMALL)
    cfg = EncoderSettings(name=name, init=str(file), args=args, **more)
    return build_encoder(cfg, in_chans=channels, sizes={"view": (size, size)}).double().eval()


def save(tmp_path: Path, content: Any, name: str = "checkpoint.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def images(size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def double(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


def assert_equal(encoder: Encoder, expected: Tensor, size: int = 16, tolerance: float = 1e-10) -> None:
    tokens = encoder.model.forward_features(images(size)).flatten(1, -2)
    torch.testing.assert_close(tokens, expected, rtol=tolerance, atol=tolerance)
    found = encoder(images(size)).patches
    torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=tolerance, atol=tolerance)


def wrapped(system: str, own: State, other: State) -> dict[str, Any]:
    """The file of a system around the encoder that it publishes, and another one."""
    args, optimizer = argparse.Namespace(lr=0.1), {"state": {0: {"exp_avg": torch.ones(3)}}}
    heads = random_state(linear("head.mlp.0", 8, DIM) | {"head.last_layer.weight_g": (5, 1)}, 7)
    student = under("module.", under("backbone.", other) | heads)
    if system == "mae":
        decoder = random_state(linear("decoder_embed", 8, DIM) | norm("decoder_blocks.0.norm1", 8), 5)
        more = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
        return {"model": own | decoder | more, "optimizer": optimizer, "epoch": 3, "args": args, "scaler": {}}
    if system == "moco_v3":
        head = random_state(linear("head.0", 8, DIM), 5)
        state = under("module.base_encoder.", own | head) | under("module.momentum_encoder.", other | head)
        return {"epoch": 3, "arch": "vit_base", "state_dict": state | under("module.predictor.", head)}
    if system == "dino":
        loss = {"center": torch.zeros(1, 5)}
        return {"student": student, "teacher": under("backbone.", own) | heads, "args": args, "dino_loss": loss}
    if system == "ibot":
        masked = {"module.backbone.masked_embed": torch.zeros(1, DIM)}
        return {"student": student | masked, "teacher": under("backbone.", own) | heads, "optimizer": optimizer}
    predictor = {"module.predictor_pos_embed": torch.zeros(1, 16, 8), "module.mask_token": torch.zeros(1, 1, 8)}
    if system == "ijepa":
        return {
            "encoder": under("module.", other),
            "predictor": predictor,
            "target_encoder": under("module.", own),
            "opt": optimizer,
        }
    assert system == "msn"
    head = random_state(linear("fc.fc1", 8, DIM) | {"fc.bn1.running_mean": (8,)}, 5)
    return {
        "target_encoder": under("module.", own | head),
        "encoder": under("module.", other | head),
        "prototypes": torch.zeros(4, 8),
        "opt": optimizer,
    }


SYSTEMS = {
    "mae": ("MAE", "decoder_blocks", None),
    "moco_v3": ("MoCo v3", "predictor.head", "momentum_encoder"),
    "dino": ("DINO", "student.backbone.blocks", "student"),
    "ibot": ("iBOT", "student.backbone.masked_embed", "student"),
    "ijepa": ("I-JEPA", "predictor.predictor_pos_embed", "encoder"),
    "msn": ("MSN", "target_encoder.fc.fc1", "encoder"),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_encoder_of_a_full_checkpoint_is_taken(system: str, tmp_path: Path) -> None:
    shapes = vit_shapes(tokens=0 if system == "ijepa" else 1)
    own, other = random_state(shapes, 1), random_state(shapes, 2)
    file = save(tmp_path, wrapped(system, own, other), "checkpoint.pth.tar")
    encoder = load(file)
    assert_equal(encoder, vit(double(own), images()))
    spoken, ignored, second = SYSTEMS[system]
    assert f"checkpoint.pth.tar ({spoken}" in encoder.origin[0]
    assert f"all {len(own)} tensors of the encoder found" in encoder.origin[0]
    assert ignored in encoder.origin[-1]
    if second is not None:
        assert f"(not {second})" in encoder.origin[0]
        assert_equal(load(file, init_part=second), vit(double(other), images()))
        with pytest.raises(ValueError, match="none is called 'nobody'.*init_part"):
            load(file, init_part="nobody")


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_bare_encoder_is_taken_as_it_is(wrapper: str | None, tmp_path: Path) -> None:
    state = random_state(vit_shapes(), 1)
    encoder = load(save(tmp_path, {wrapper: state} if wrapper else state))
    assert_equal(encoder, vit(double(state), images()))


def test_no_class_token_becomes_an_average_and_the_last_norm_stays(tmp_path: Path) -> None:
    state = random_state(vit_shapes(tokens=0), 1)
    encoder = load(save(tmp_path, state))
    assert_equal(encoder, vit(double(state), images()))
    torch.testing.assert_close(encoder(images()).cls, vit(double(state), images()).mean(1))
    assert "class_token=False, global_pool=avg, fc_norm=False" in encoder.origin[1]


def test_norm_behind_the_pool_is_found(tmp_path: Path) -> None:
    state = random_state(vit_shapes(last="fc_norm"), 1)
    encoder = load(save(tmp_path, state))
    tokens = vit(double(state), images(), last=None)
    torch.testing.assert_close(encoder(images()).cls, layer_norm(double(state), "fc_norm", tokens[:, 1:].mean(1)))


def test_multimae_image_adapter_is_the_stem_and_nothing_is_normed(tmp_path: Path) -> None:
    plain = random_state(vit_shapes(tokens=1), 1)
    positions = random_state({"p": (1, DIM, 4, 4)}, 3)["p"]
    state = {name.replace("blocks.", "encoder."): t for name, t in plain.items() if name.startswith("blocks.")}
    state |= {"global_tokens": plain["cls_token"], "input_adapters.rgb.pos_emb": positions}
    state |= {f"input_adapters.rgb.proj.{kind}": plain[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    state |= {"input_adapters.depth.pos_emb": positions, "output_adapters.rgb.task_embeddings": torch.zeros(1, 1, 8)}
    encoder = load(save(tmp_path, {"model": state, "args": argparse.Namespace()}))
    direct = plain | {"pos_embed": torch.cat([torch.zeros(1, 1, DIM), positions.flatten(2).mT], 1)}
    assert_equal(encoder, vit(double(direct), images(), last=None))
    assert "final_norm=False" in encoder.origin[1] and "MultiMAE" in encoder.origin[0]


def cmae(s: State, x: Tensor) -> Tensor:
    x = patches(s, "patch_embed.projection", x)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    for i in range(DEPTH):
        name = f"layers.{i}"
        q, k, v = dense(s, f"{name}.attn.qkv", layer_norm(s, f"{name}.ln1", x)).chunk(3, -1)
        x = x + dense(s, f"{name}.attn.proj", attend(q, k, v, HEADS))
        hidden = F.gelu(dense(s, f"{name}.ffn.layers.0.0", layer_norm(s, f"{name}.ln2", x)))
        x = x + dense(s, f"{name}.ffn.layers.1", hidden)
    return layer_norm(s, "ln1", x)


def cmae_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"cls_token": (1, 1, DIM), "pos_embed": (1, 17, DIM), "patch_embed.projection.bias": (DIM,)}
    shapes |= {"patch_embed.projection.weight": (DIM, 3, 4, 4)} | norm("ln1")
    for i in range(DEPTH):
        name = f"layers.{i}"
        shapes |= norm(f"{name}.ln1") | norm(f"{name}.ln2") | linear(f"{name}.attn.qkv", 3 * DIM, DIM)
        shapes |= linear(f"{name}.attn.proj", DIM, DIM) | linear(f"{name}.ffn.layers.0.0", 4 * DIM, DIM)
        shapes |= linear(f"{name}.ffn.layers.1", DIM, 4 * DIM)
    return shapes


def test_cmae_online_encoder_is_taken(tmp_path: Path) -> None:
    own, other = random_state(cmae_shapes(), 1), random_state(cmae_shapes(), 2)
    state = under("backbone.", own) | under("target_backbone.", other) | {"pixel_decoder.mask_token": torch.zeros(1)}
    file = save(tmp_path, {"state_dict": state, "author": "CMAE", "meta": {"epoch": 1}})
    encoder = load(file)
    assert_equal(encoder, cmae(double(own), images()))
    assert "CMAE, its backbone (not target_backbone)" in encoder.origin[0]
    assert_equal(load(save(tmp_path, {"state_dict": own}, "bare.pth")), cmae(double(own), images()))
