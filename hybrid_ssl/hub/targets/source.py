"""What every target starts from, and the one way in which their files are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import timm
import torch
from torch import Tensor, nn

from ...storage import sync
from ..folder import CONFIG


@dataclass(frozen=True)
class Source:
    """An exported encoder, loaded: on the CPU, float32, eval, plain attention."""

    model: Any
    name: str
    """timm's name of the architecture"""
    size: tuple[int, int, int]
    """channels, height, width that it was trained at"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str

    def facts(self) -> dict[str, Any]:
        """For the metadata of a file."""
        return {
            "architecture": self.name,
            "input_size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "license": self.licence,
        }


class Features(nn.Module):
    """The encoder as a function of images only: (features [B, D], tokens [B, N, D] or what the family calls so)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens, pre_logits=True), tokens


def read_source(folder: Path) -> Source:
    """Load an exported folder."""
    config = json.loads((folder / CONFIG).read_text())
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    module: Any  # not every module has the attribute
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # graphs of plain attention run everywhere
    weights = config["pretrained_cfg"]
    channels, height, width = weights["input_size"]
    return Source(
        model,
        config["architecture"],
        (channels, height, width),
        tuple(weights["mean"]),
        tuple(weights["std"]),
        weights.get("license", "other"),
    )


@contextmanager
def published(out: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Give a file to write to; it becomes `out` when the block ends without an exception, else nothing is left.

    Raises:
        ValueError: `out` is a folder, or its name does not end as readers of the format expect.
    """
    if out.suffix not in suffixes or out.is_dir():
        raise ValueError(f"{out} cannot be written: give a file whose name ends in {' or '.join(suffixes)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{uuid4().hex}{out.suffix}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(content: dict[str, Any], out: Path) -> None:
    """`content` as a .pth file of tensors and plain values, which loads with `weights_only=True`."""
    with published(out, (".pth",)) as path:
        torch.save(content, path)
