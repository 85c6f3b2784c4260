"""Exported encoders of the smallest size, and fine-tuning by the command line in this process."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from accelerate.state import AcceleratorState
from torch import nn

from hybrid_ssl.cli import main
from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts
from tests.runs import SWIN, VIT


def build(family: str, channels: int, size: int) -> nn.Module:
    """timm's model of `family` (vit or swin) with random weights."""
    torch.manual_seed(0)
    spec = {"vit": VIT, "swin": SWIN}[family]
    return timm.create_model(spec["name"], num_classes=0, in_chans=channels, img_size=size, **spec["args"])


def export_tiny(folder: Path, family: str = "vit", channels: int = 1, size: int = 16) -> Path:
    """An exported folder; its weights are those of `build`."""
    mean, std = [0.3] * channels, [0.4] * channels
    export_encoder(
        build(family, channels, size), folder, input_size=(channels, size, size), mean=mean, std=std,
        card=CardFacts(), licence="other", verify=False,
    )  # fmt: skip
    return folder


def finetune(*words: str | Path) -> int:
    """`hybrid-ssl finetune WORDS`; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several runs
    return main(["finetune", *map(str, words)])
