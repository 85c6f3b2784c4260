"""Each parameter's share of the learning rate is that of MAE's (ViT) and SimMIM's (Swin) official fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from hybrid_ssl.encoder.base import layer_ids

VIT = {"embed_dim": 32, "depth": 5, "num_heads": 2, "patch_size": 4, "img_size": 16}
DEPTHS = [2, 1, 3]
SWIN = {"embed_dim": 8, "depths": DEPTHS, "num_heads": [1, 2, 2], "patch_size": 2, "window_size": 4, "img_size": 32}
HEADS = ({"num_classes": 0}, {"num_classes": 7})


def mae(name: str, depth: int) -> int:
    """Layer of a parameter of a ViT, of 0 .. depth + 1 (MAE: layer-wise decay of its fine-tuning)."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


def simmim(name: str, depths: list[int]) -> int:
    """Of a Swin: officially patch merging is the end of a stage, in timm the start of the next."""
    if name.startswith("patch_embed"):
        return 0
    parts = name.split(".")
    if parts[0] == "layers":
        stage = int(parts[1])
        if parts[2] == "downsample":
            return sum(depths[:stage])  # stage - 1 in the official names: sum(depths[: stage - 1 + 1])
        return sum(depths[:stage]) + int(parts[3]) + 1
    return sum(depths) + 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("more", [{}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}])
def test_vit_layers_are_those_of_mae(head: dict[str, int], more: dict[str, Any]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, **head, **more)
    ids, last = layer_ids(model)
    assert last == 6
    assert ids == {name: mae(name, 5) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin_layers_are_those_of_simmim(name: str, head: dict[str, int]) -> None:
    model = timm.create_model(name, **SWIN, **head)
    ids, last = layer_ids(model)
    assert last == sum(DEPTHS) + 1
    assert any("downsample" in name for name in ids)
    assert ids == {name: simmim(name, DEPTHS) for name, _ in model.named_parameters()}


def test_register_tokens_belong_to_the_stem_and_a_pooling_attention_to_the_head() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, reg_tokens=2, global_pool="map", num_classes=3)
    ids, last = layer_ids(model)
    assert ids["reg_token"] == 0 and ids["attn_pool.q.weight"] == last == ids["head.weight"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_other_families_have_a_head_at_the_full_rate(name: str) -> None:
    with torch.device("meta"):
        plain, headed = (timm.create_model(name, num_classes=classes) for classes in (0, 3))
    ids, last = layer_ids(headed)
    assert layer_ids(plain)[1] == last and ids[f"{headed.pretrained_cfg['classifier']}.weight"] == last
    assert min(ids.values()) == 0 and set(ids.values()) == set(range(last + 1))
