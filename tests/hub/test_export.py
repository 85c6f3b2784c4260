"""Exports rebuild the very encoder, carry this run's facts only, and never leave a half-written folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hybrid_ssl.encoder import wrap
from hybrid_ssl.hub.export import Export, export_encoder
from hybrid_ssl.hub.facts import CardFacts
from hybrid_ssl.storage import StorageError

VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "drop_path_rate": 0.1}
SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2), "window_size": 2}
AVERAGE = {"global_pool": "avg", "fc_norm": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "img_size": 64}),
    "vit_dynamic": ("vit_tiny_patch16_224", {**VIT, "img_size": 96, "dynamic_img_size": True}),
    "vit_registers": ("vit_tiny_patch16_224", {**VIT, "img_size": 64, "reg_tokens": 4}),
    "vit_average": ("vit_tiny_patch16_224", {**VIT, "img_size": 64, **AVERAGE}),
    "vit_no_class_token": ("vit_tiny_patch16_224", {**VIT, "img_size": 64, "class_token": False, **AVERAGE}),
    "vit_small_patches": ("vit_tiny_patch16_224.augreg_in21k", {**VIT, "img_size": 28, "patch_size": 4}),
    "vit_224": ("vit_tiny_patch16_224", VIT),
    "eva": ("eva02_tiny_patch14_224", {**VIT, "img_size": 56}),
    "rotary": ("vit_small_patch16_dinov3", {**VIT, "img_size": 64, "dynamic_img_size": True}),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 64}),
    "swin_any_size": ("swin_tiny_patch4_window7_224", {**SWIN, "img_size": 96, "strict_img_size": False}),
    "swinv2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": 64}),
    "resnet": ("resnet10t", {}),
}


def build(key: str, in_chans: int = 3) -> nn.Module:
    name, args = MODELS[key]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, in_chans=in_chans, **args)
    for parameter in model.parameters():  # fresh models have zeros that would hide a missing tensor
        nn.init.normal_(parameter, std=0.05)
    return model


def size_of(key: str) -> int:
    return int(MODELS[key][1].get("img_size", 224 if "224" in MODELS[key][0] else 64))


def mean(channels: int) -> tuple[float, ...]:
    return tuple(0.25 + c / 64 for c in range(channels))


def export(model: nn.Module, folder: Path, size: int, channels: int = 3, **changes: Any) -> Export:
    facts: dict[str, Any] = {
        "input_size": (channels, size, size),
        "mean": mean(channels),
        "std": [0.2] * channels,
        "card": CardFacts(title="an encoder"),
        "verify": False,
    }
    return export_encoder(model, folder, **facts | changes)


@pytest.mark.parametrize("in_chans", [1, 3, 4, 13])
@pytest.mark.parametrize("key", MODELS)
def test_export_rebuilds_the_encoder_with_equal_outputs(key: str, in_chans: int, tmp_path: Path) -> None:
    size = size_of(key)
    model = build(key, in_chans)
    export(model, tmp_path / "out", size, in_chans)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, in_chans, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
        assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    assert loaded.num_classes == 0 and loaded(images).ndim == 2
    data = timm.data.resolve_model_data_config(loaded)
    assert data["input_size"] == (in_chans, size, size)
    assert tuple(data["mean"]) == mean(in_chans) and tuple(data["std"]) == (0.2,) * in_chans


@pytest.mark.parametrize("key", ["vit_dynamic", "swin_any_size", "rotary"])
def test_flexible_encoders_stay_flexible(key: str, tmp_path: Path) -> None:
    model = build(key).eval()
    export(model, tmp_path / "out", size_of(key))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for height, width in ((64, 64), (128, 96)):
        images = torch.randn(1, 3, height, width)
        assert torch.equal(loaded(images), model(images))


def test_nothing_of_the_published_weights_leaks(tmp_path: Path) -> None:
    published = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    folder = export(build("vit"), tmp_path / "out", 64, licence="cc-by-4.0").folder
    config = json.loads((folder / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert cfg["license"] == "cc-by-4.0" and cfg["tag"] == "hybrid_ssl"
    assert cfg["input_size"] == [3, 64, 64] and cfg["crop_pct"] == 1.0 and cfg["interpolation"] == "bicubic"
    assert cfg["mean"] == list(mean(3)) and cfg["std"] == [0.2] * 3
    text = "".join(p.read_text() for p in (folder / "config.json", folder / "README.md"))
    assert published.tag not in text and published.license not in text and "huggingface.co" not in text
    assert "num_classes" not in config["model_args"] and "drop_path_rate" not in config["model_args"]
    assert config["num_classes"] == cfg["num_classes"] == 0


def test_the_wrapped_encoder_in_training_exports_its_plain_weights(tmp_path: Path) -> None:
    """Left-over noise of a training step, attention switches and layouts are no part of an export."""
    wrapped = wrap(build("vit_dynamic")).train()
    wrapped(torch.randn(2, 3, 96, 96), noise=torch.rand(wrapped.noise_rows, 2))
    wrapped.model.to(memory_format=torch.channels_last)
    export(wrapped.model, tmp_path / "out", 96)
    assert wrapped.model.training
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == wrapped.model.state_dict().keys()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), wrapped.eval()(images).cls)


def test_heads_are_apart_and_config_says_how_it_was_trained(tmp_path: Path) -> None:
    head = nn.Linear(3, 2)
    heads = {"mae.head.weight": head.weight, "mae.tied": head.weight, "dino.centre": torch.ones(2, 4).t()}
    facts = CardFacts(objectives={"mae": "1"}, methods={"mae": ("Masked.", "2111.06377")}, steps=7)
    folder = export(build("vit"), tmp_path / "out", 64, heads=heads, card=facts).folder
    found = load_file(folder / "heads.safetensors")
    assert found.keys() == heads.keys() and all(torch.equal(found[k], heads[k]) for k in heads)
    config = json.loads((folder / "config.json").read_text())
    assert config["ssl"]["objectives"] == {"mae": "1"} and config["ssl"]["steps"] == 7
    assert config["pretrained_cfg"]["paper_ids"] == ["arXiv:2111.06377"]


def test_exporting_twice_gives_the_same_bytes_and_replaces_the_first(tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        folder = export(build("vit"), tmp_path / "out", 64).folder
        contents.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert contents[0] == contents[1]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_refused_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    model = build("vit")
    folder = export(model, tmp_path / "out", 64).folder
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"not finite: norm\.weight"):
        export(model, folder, 64)
    with pytest.raises(ValueError, match="Requested image size"):
        export(build("vit"), folder, 96)
    assert (folder / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        ({"num_classes": 5}, {}, "classifier of 5 classes"),
        ({"num_classes": 0, "global_pool": ""}, {}, "token or avg"),
        ({"num_classes": 0}, {"mean": [0.5]}, "3 channels, but 1 means"),
    ],
)
def test_what_would_mislead_users_is_refused(
    args: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, img_size=64, **args)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", 64, **changes)
    assert not list(tmp_path.iterdir())


def test_a_model_not_built_by_timm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"timm\.create_model"):
        export(nn.Sequential(nn.Linear(2, 2)), tmp_path / "out", 64)


def test_an_encoder_that_started_from_an_export_exports_again(tmp_path: Path) -> None:
    """Continued training, also at another size and number of channels."""
    export(build("vit_registers"), tmp_path / "first", 64)
    again = timm.create_model(f"local-dir:{tmp_path / 'first'}", pretrained=True, img_size=96, in_chans=4).eval()
    export(again, tmp_path / "second", 96, 4)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'second'}", pretrained=True).eval()
    images = torch.randn(2, 4, 96, 96)
    assert torch.equal(loaded(images), again(images)) and loaded.num_reg_tokens == 4
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()


def test_disk_that_is_full_is_a_storage_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("hybrid_ssl.hub.export.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        export(build("vit_registers"), tmp_path / "encoder", 64, heads={"head.weight": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
