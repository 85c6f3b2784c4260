"""A tiny exported ViT and Swin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2, "window_size": 4, "img_size": 16},
    ),
}


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> exported folder."""
    root = tmp_path_factory.mktemp("encoders")
    for family, (name, args) in MODELS.items():
        torch.manual_seed(7)
        model = timm.create_model(name, num_classes=0, **args)
        mean_std = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
        export_encoder(model, root / family, input_size=(3, 16, 16), card=CardFacts(), verify=False, **mean_std)
    return {family: root / family for family in MODELS}
