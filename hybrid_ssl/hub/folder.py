"""What an exported folder is called and holds. Imports nothing heavy, so that pushing one starts at once."""

from __future__ import annotations

from pathlib import Path

from ..exported import CONFIG, WEIGHTS, find_export, is_export

__all__ = ["CARD", "CONFIG", "HEADS", "WEIGHTS", "find_export", "is_export", "refuse_foreign"]

HEADS = "heads.safetensors"
CARD = "README.md"


def refuse_foreign(folder: Path) -> None:
    """ValueError unless an export may be written to `folder`: it is new, empty, or an earlier export."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is no folder: choose another one, an export replaces what is there")
    if folder.is_dir() and any(folder.iterdir()) and not is_export(folder):
        raise ValueError(f"{folder} holds other files, and an export replaces what is there: choose a new folder")
