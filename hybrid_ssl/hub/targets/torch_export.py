"""`torch.export`: the encoder as one .pt2 file, which runs in torch without timm, and compiles ahead of time."""

from __future__ import annotations

from pathlib import Path

import torch

from .dynamic import check, describe, trace
from .source import Source, published


def to_torch_export(source: Source, out: Path, verify: bool) -> list[str]:
    """Write a .pt2 file."""
    with published(out, (".pt2",)) as path:
        torch.export.save(trace(source), path)
        report = [check(source, torch.export.load(path).module(), tolerance=1e-6)] if verify else []
    return [
        *report,
        describe(source),
        f"run it: features, tokens = torch.export.load({out.name!r}).module()(images)",
    ]
