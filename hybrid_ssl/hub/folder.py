"""What an exported folder is called and holds. Imports nothing heavy, so that pushing one starts at once."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
HEADS = "heads.safetensors"
CARD = "README.md"


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


def refuse_foreign(folder: Path) -> None:
    """ValueError unless an export may be written to `folder`: it is new, empty, or an earlier export."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is no folder: choose another one, an export replaces what is there")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise ValueError(f"{folder} holds other files, and an export replaces what is there: choose a new folder")
