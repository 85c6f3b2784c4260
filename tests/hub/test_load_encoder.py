"""One name loads an export, a run, or a timm model; what is wrong is said in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts
from hybrid_ssl.hub.load import load_encoder, resolve


def export(folder: Path, name: str = "vit_tiny_patch16_224", **args: object) -> nn.Module:
    model = timm.create_model(name, num_classes=0, img_size=64, **args).eval()
    export_encoder(model, folder, input_size=(3, 64, 64), mean=[0.5] * 3, std=[0.5] * 3, card=CardFacts(), verify=False)
    return model


VIT = {"depth": 1, "embed_dim": 48, "num_heads": 3}


def test_folder_loads_as_it_was_exported(tmp_path: Path) -> None:
    model = export(tmp_path / "out", **VIT)
    images = torch.randn(2, 3, 64, 64)
    for name in (tmp_path / "out", str(tmp_path / "out"), f"local-dir:{tmp_path / 'out'}"):
        loaded = load_encoder(name)
        assert not loaded.training and torch.equal(loaded(images), model(images))


def test_run_folder_loads_its_newest_export(tmp_path: Path) -> None:
    names = ["exports/step-00000002", "encoder", "exports/.tmp-step-00000009"]
    for i, name in enumerate(names):
        export(tmp_path / name, **VIT)
        os.utime(tmp_path / name / "config.json", (1000 + i, 1000 + i))
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "config.json").write_text("{broken")
    assert resolve(tmp_path) == f"local-dir:{tmp_path / 'encoder'}"


def test_size_and_channels_can_change_on_the_way(tmp_path: Path) -> None:
    export(tmp_path / "vit", **VIT)
    assert load_encoder(tmp_path / "vit", in_chans=5, size=96)(torch.randn(1, 5, 96, 96)).shape == (1, 48)
    export(
        tmp_path / "swin",
        "swin_tiny_patch4_window7_224",
        depths=(1, 1, 1, 1),
        embed_dim=12,
        num_heads=(1, 1, 2, 2),
        window_size=2,
    )
    assert load_encoder(tmp_path / "swin", size=(128, 64))(torch.randn(1, 3, 128, 64)).shape == (1, 96)


def test_timm_names_load_and_families_without_image_size_take_any() -> None:
    assert load_encoder("resnet10t", in_chans=1, size=48, pretrained=False)(torch.randn(1, 1, 48, 48)).shape == (1, 512)
    assert resolve("vit_tiny_patch16_224.augreg_in21k") == "vit_tiny_patch16_224.augreg_in21k"
    assert resolve("hf-hub:user/name") == "hf-hub:user/name"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_22", "similar names: vit_tiny_patch16_224"),
        ("user/encoder", "for the Hub write 'hf-hub:user/encoder'"),
        ("/does/not/exist", "does not exist"),
        ("local-dir:./nothing", "does not exist"),
    ],
)
def test_unknown_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(name)


def test_folder_without_encoder_and_sizes_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no exported encoder"):
        load_encoder(tmp_path)
    export(tmp_path / "out", **VIT)
    with pytest.raises(ValueError, match="cannot be built with num_classes=0, size=8"):
        load_encoder(tmp_path / "out", size=8)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be built"):
        load_encoder(tmp_path / "out")
