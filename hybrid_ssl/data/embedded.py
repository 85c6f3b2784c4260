"""The images that come with the package: real, labelled, small enough for a first run (`embedded:fashion_mnist`)."""

from __future__ import annotations

from pathlib import Path

SCHEME = "embedded:"
_HERE = Path(__file__).parent
_SETS = {"fashion_mnist": _HERE / "fashion_mnist"}


def embedded_folder(source: str) -> Path:
    """Folder with a parquet file for each split, e.g. of `embedded:fashion_mnist`; independent of the cwd."""
    name = source.removeprefix(SCHEME)
    if name not in _SETS:
        known = ", ".join(SCHEME + known for known in _SETS)
        raise ValueError(f"data.source: {source!r} is no embedded data set; there is: {known}")
    return _SETS[name]
