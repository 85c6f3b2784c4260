"""What an exported folder is, and where a run keeps its newest. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def is_export(folder: Path) -> bool:
    """Whether timm can load `folder`: its config names an architecture, and the weights are there."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "architecture" in config and (folder / WEIGHTS).is_file()


def find_export(folder: Path) -> Path:
    """`folder` itself if it is an export, else the newest export up to two levels below it.

    Raises:
        ValueError: there is none.
    """
    if is_export(folder):
        return folder
    found = [p.parent for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}") for p in folder.glob(pattern)]
    exports = [p for p in found if is_export(p) and not p.name.startswith(".")]
    if not exports:
        raise ValueError(f"{folder} holds no exported encoder ({CONFIG} of timm and {WEIGHTS}): has the run ended?")
    return max(exports, key=lambda p: (p / CONFIG).stat().st_mtime_ns)
