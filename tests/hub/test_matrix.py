"""Every kind of encoder, with any number of channels and at any size, loads in every way with equal outputs.

By default a selection in which each kind, number of channels and size occurs; `-m slow` runs all combinations.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts

transformers = pytest.importorskip("transformers")

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"depths": (1, 2, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2)}
AVERAGE: dict[str, Any] = {"global_pool": "avg", "fc_norm": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", VIT),
    "registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 4, "dynamic_img_size": True}),
    "average pool": ("vit_tiny_patch16_224", {**VIT, **AVERAGE}),
    "no class token": ("vit_tiny_patch16_224", {**VIT, **AVERAGE, "class_token": False}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
}
SIZES = {64: {"window_size": 2}, 96: {"window_size": 3}, 224: {"window_size": 7}}
CHANNELS = (1, 3, 4, 13)
DEFAULT = {
    ("class token", 3, 224),
    ("registers", 13, 96),
    ("average pool", 1, 64),
    ("no class token", 4, 64),
    ("swin", 3, 96),
    ("swinv2", 1, 64),
}
CASES = [
    pytest.param(*case, marks=[] if case in DEFAULT else [pytest.mark.slow]) for case in product(KINDS, CHANNELS, SIZES)
]


def build(kind: str, channels: int, size: int) -> nn.Module:
    name, args = KINDS[kind]
    if kind.startswith("swin"):
        args = args | SIZES[size]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=size, in_chans=channels, **args).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("kind", "channels", "size"), CASES)
@torch.no_grad()
def test_loads_in_every_way_with_equal_outputs(kind: str, channels: int, size: int, tmp_path: Path) -> None:
    model, folder = build(kind, channels, size), tmp_path / "out"
    export_encoder(
        model,
        folder,
        input_size=(channels, size, size),
        mean=[0.4] * channels,
        std=[0.2] * channels,
        card=CardFacts(),
        verify=False,
    )
    images = torch.randn(2, channels, size, size)
    tokens, pooled = model.forward_features(images), model(images)

    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(in_timm.forward_features(images), tokens) and torch.equal(in_timm(images), pooled)

    auto, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    out = auto.eval()(pixel_values=images)
    assert not any(info.values())
    assert torch.equal(out.last_hidden_state, tokens) and torch.equal(out.pooler_output, pooled)

    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=5).eval()
    assert classifier(pixel_values=images).logits.shape == (2, 5)
    assert torch.equal(classifier.timm_model.forward_features(images), tokens)

    check_backbone(folder, model, images)
    if channels == 3:
        check_pixels(folder, model, size)


def check_backbone(folder: Path, model: Any, images: Tensor) -> None:
    """TimmBackbone's feature maps are the outputs of blocks (ViT) or stages (Swin)."""
    arguments = {"out_indices": (0, 1), "num_channels": images.shape[1]}
    backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{folder}", **arguments).eval()
    expected = model.forward_intermediates(images, indices=[0, 1], intermediates_only=True, output_fmt="NCHW")
    for found, target in zip(backbone(images).feature_maps, expected, strict=True):
        found = found if found.shape == target.shape else found.permute(0, 3, 1, 2)  # timm's Swin: channels last
        torch.testing.assert_close(found, target, rtol=1e-5, atol=1e-5)


def check_pixels(folder: Path, model: nn.Module, size: int) -> None:
    """From a picture: the image processor's tensor is timm's, and the pipeline gives the features of that tensor."""
    noise = (torch.rand(80, 100, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    picture = Image.fromarray(noise.numpy())
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, size, size)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}", pretrained=True))
    torch.testing.assert_close(timm.data.create_transform(**config)(picture), pixels[0], rtol=0, atol=1e-5)
    extract = transformers.pipeline("image-feature-extraction", model=str(folder), pool=True)
    torch.testing.assert_close(torch.tensor(extract(picture)), model(pixels), rtol=1e-5, atol=1e-5)
