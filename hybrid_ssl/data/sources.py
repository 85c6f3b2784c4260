"""Where images come from: one small interface, and the function that opens anything a recipe may name.

A source knows its images by number, in an order that depends on nothing but the data: 0..n-1 are the sample ids.
Reading yields encoded bytes, a path or an array and never decodes, so that one decoder serves every container; the
container costs less than a tenth of a JPEG's decoding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .embedded import SCHEME, embedded_folder
from .order import permutation
from .settings import DataSettings

IMAGE_COLUMN_HINT = "data.image names the column of the images, data.label that of the labels"


class NoSplit(ValueError):
    """The source is there, the split is not."""

    def __init__(self, name: str, split: str, known: Iterable[str]) -> None:
        known = list(known)
        there = f"it has: {', '.join(known)}" if known else "it has no splits, so only 'train', which is everything"
        super().__init__(f"{name} has no split {split!r}; {there}")


class Source:
    """Where images come from: `Images`, which have numbers, or a `Stream` (streams.py)."""

    labels: Tensor | None = None
    """int64 [n], or None"""
    class_names: list[str] | None = None
    fingerprint: str
    """differs when the list of images differs; a resumed run compares it"""

    def __len__(self) -> int:
        """Images of one epoch."""
        raise NotImplementedError

    def describe(self) -> str:
        """One sentence, e.g. `12,345 images in ./images (3 folders), 2 files are no images`."""
        raise NotImplementedError

    def sample(self, count: int) -> Iterator[tuple[int, Any, int | None]]:
        """Id, encoded image and label of up to `count` images, the same ones in every call."""
        raise NotImplementedError


class Images(Source):
    """Images by number. Subclasses set the attributes and define `__len__`, `read`, `name` and `describe`."""

    def sample(self, count: int) -> Iterator[tuple[int, Any, int | None]]:
        """Drawn once for all, ascending; those that cannot be read are left out (the loader counts and names them)."""
        for i in permutation(len(self), 0, 0)[:count].sort().values.tolist():
            try:
                yield i, *self.read(i)
            except ValueError:
                continue

    def read(self, i: int) -> tuple[Any, int | None]:
        """Encoded bytes, a path or an array, and the label if there is one. `ValueError` if it cannot be read."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """What a person would call image `i`; one printable line."""
        raise NotImplementedError

    def key(self, i: int) -> str:
        """What image `i` is called inside its folder, wherever that is; ValueError if the source has no such names."""
        raise ValueError(f"{self.describe()}: these are no files in a folder, so others cannot be called like them")

    def keep(self, columns: Sequence[str]) -> None:
        """Make more columns readable by `cell`; ValueError for one that is not there."""
        if columns:
            raise ValueError(f"{self.describe()}: there are no columns, so none is called {columns[0]!r}")

    def cell(self, i: int, column: str) -> Any:
        """A kept column of row `i`, undecoded."""
        raise NotImplementedError

    def label(self, i: int) -> int | None:
        return None if self.labels is None else int(self.labels[i])


class Subset(Images):
    """Some rows of another source, in ascending order."""

    def __init__(self, source: Images, rows: Tensor, why: str) -> None:
        self.source, self.rows, self.why = source, rows, why
        self.labels = None if source.labels is None else source.labels[rows]
        self.class_names = source.class_names
        self.fingerprint = f"{source.fingerprint}-{len(rows)}"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> tuple[Any, int | None]:
        return self.source.read(int(self.rows[i]))[0], self.label(i)

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))

    def key(self, i: int) -> str:
        return self.source.key(int(self.rows[i]))

    def cell(self, i: int, column: str) -> Any:
        return self.source.cell(int(self.rows[i]), column)

    def describe(self) -> str:
        return f"{len(self):,} images ({self.why}) of: {self.source.describe()}"


def subset(source: Images, count: int, why: str) -> Images:
    """`count` images (drawn: the first ones of sorted folders would be one class), or all if there are fewer."""
    if count >= len(source):
        return source
    return Subset(source, permutation(len(source), 0, 0)[:count].sort().values, why)


def open_source(cfg: DataSettings) -> Source:
    """Open `data.source`.

    Raises:
        ValueError: with what was given, what is there, and what to do.
    """
    options = {"config": cfg.config, "revision": cfg.revision, "image": cfg.image, "label": cfg.label}
    if cfg.streaming:
        from .streams import open_stream

        return open_stream(_names(cfg.source), cfg.limit, split=cfg.split, **options)
    source = open_named(cfg.source, split=cfg.split, **options)
    source.keep([each.column for each in cfg.modalities.values() if each.column is not None])
    return source if cfg.limit is None else subset(source, cfg.limit, "data.limit")


def open_named(
    named: str | Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Images:
    """Open a source by its name or path; see `DataSettings` for the arguments."""
    from .files import open_folders, open_list
    from .tables import is_table, open_table
    from .tars import find_shards, open_tars

    names = _names(named)
    if all(is_table(name) for name in names):
        return open_table(names, split=split, config=config, revision=revision, image=image, label=label)
    if image is not None or label is not None:
        raise ValueError(f"{IMAGE_COLUMN_HINT}; {names[0]!r} has no columns: leave them out")
    paths = [Path(name).expanduser() for name in names]
    if len(paths) == 1 and paths[0].suffix == ".txt" and paths[0].is_file():
        return open_list(paths[0])
    shards = find_shards(names)
    return open_tars(shards, split) if shards else open_folders(paths, split)


def _names(named: str | Sequence[str]) -> list[str]:
    names = [named] if isinstance(named, str) else list(named)
    if not names:
        raise ValueError("data.source is an empty list: name a folder, a file or a data set")
    return [str(embedded_folder(name)) if name.startswith(SCHEME) else name for name in names]


def printable(path: str | bytes) -> str:
    """A path as one line of valid text, whatever bytes are in it."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def as_labels(values: Sequence[Any]) -> tuple[Tensor, list[str] | None]:
    """Integers as they are; anything else is numbered in sorted order: (int64 [n], class names or None)."""
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.int64), None
    names = sorted({str(value) for value in values})
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[str(value)] for value in values], dtype=torch.int64), names
