"""Small encoders as sources of targets."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from hybrid_ssl.hub.targets.source import Source

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"depths": (1, 2, 1, 1), "embed_dim": 12, "num_heads": (1, 2, 2, 4)}


def source(name: str = "vit_tiny_patch16_224", size: int = 64, channels: int = 3, **args: Any) -> Source:
    torch.manual_seed(0)
    if name.startswith("vit"):
        args = VIT | args
    elif name.startswith("swin"):
        args = SWIN | args
    model = timm.create_model(name, num_classes=0, img_size=size, in_chans=channels, **args).eval()
    for parameter in model.parameters():  # fresh models have zeros and ones, which hide what is misplaced
        nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return Source(model, name, (channels, size, size), (0.5,) * channels, (0.25,) * channels, "mit")
