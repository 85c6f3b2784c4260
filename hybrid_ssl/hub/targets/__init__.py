"""Encoders for programs that do not read timm's format: one function a target, each gives what to do with the file.

A target takes the encoder, where to write, and whether to check the file by loading it; it returns lines for the user.
A new one is a function and a line in `TARGETS`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..from_run import Network, export_place
from .detectron2 import to_detectron2
from .onnx import to_onnx
from .openmmlab import to_mmdet, to_mmseg
from .source import Source, read_source
from .torch_export import to_torch_export

Target = Callable[[Source, Path, bool], list[str]]
TARGETS: Mapping[str, Target] = {
    "onnx": to_onnx,
    "torch-export": to_torch_export,
    "mmdet": to_mmdet,
    "mmseg": to_mmseg,
    "detectron2": to_detectron2,
}
TIMM = "timm"


def export_to(
    target: str,
    place: Path,
    out: Path,
    *,
    network: Network | None = None,
    licence: str | None = None,
    verify: bool = True,
) -> list[str]:
    """Export for `timm` (a folder, also for transformers) or one of `TARGETS` (a file).

    Args:
        place, network, licence: see `from_run.export_place`.
        out: replaced once the new export is complete.
        verify: load what was written, and compare outputs.

    Returns:
        what was checked, and how to use it.

    Raises:
        ValueError: there is nothing to export, the target cannot represent this encoder, or the copy computes
            something else; `out` is as it was.
    """
    if target == TIMM:
        done = export_place(place, out, network=network, licence=licence, verify=verify)
        return list(done.report.lines) if done.report else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_place(place, Path(scratch) / "encoder", network=network, licence=licence, verify=False).folder
        return TARGETS[target](read_source(folder), out, verify)
