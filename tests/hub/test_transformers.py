"""An export loads in every way that transformers offers for timm models, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts

transformers = pytest.importorskip("transformers")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "registers": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "reg_tokens": 4}),
    "average": (
        "vit_tiny_patch16_224",
        {
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 3,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "dynamic_img_size": True,
        },
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2), "window_size": 2},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    name, args = MODELS[request.param]
    model = timm.create_model(name, num_classes=0, img_size=64, **args).eval()
    folder = tmp_path_factory.mktemp("export") / "out"
    export_encoder(
        model,
        folder,
        input_size=(3, 64, 64),
        mean=[0.1, 0.2, 0.3],
        std=[0.2] * 3,
        card=CardFacts(),
        heads={"mae.decoder.weight": torch.ones(2, 2)},
        verify=False,
    )
    return folder, model


def image() -> Image.Image:
    pixels = (torch.rand(80, 100, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def test_auto_model_processor_and_pipeline_agree_with_timm(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(image(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    assert torch.allclose(timm.data.create_transform(**config)(image()), pixels[0], atol=1e-5)
    loaded, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.eval()(pixel_values=pixels).pooler_output, model(pixels))
    extract = transformers.pipeline("image-feature-extraction", model=str(folder), pool=True)
    assert torch.allclose(torch.tensor(extract(image())), model(pixels), atol=1e-6)


@torch.no_grad()
def test_classifier_starts_from_the_encoder(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    loaded, info = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=5, output_loading_info=True
    )
    assert info["missing_keys"] and all("head" in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    pixels = torch.randn(2, 3, 64, 64)
    assert loaded.eval()(pixel_values=pixels).logits.shape == (2, 5)
    assert torch.equal(loaded.timm_model.forward_features(pixels), model.forward_features(pixels))


@torch.no_grad()
def test_backbone_has_the_trained_weights(exported: tuple[Path, nn.Module]) -> None:
    folder, model = exported
    backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{folder}", out_indices=(0, 1))
    weights = {name: value for name, value in backbone.state_dict().items() if name.endswith("patch_embed.proj.weight")}
    assert len(weights) == 1 and torch.equal(
        next(iter(weights.values())), model.state_dict()["patch_embed.proj.weight"]
    )
    assert len(backbone.eval()(torch.randn(1, 3, 64, 64)).feature_maps) == 2


@torch.no_grad()
def test_what_transformers_saves_again_still_loads(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = exported
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again").eval()
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(pixel_values=pixels).pooler_output, model(pixels))
    assert again.config.ssl["network"] == "student"
