"""Tables of Hugging Face `datasets`: Hub names, parquet and arrow files, `save_to_disk` folders.

Images are read undecoded: `datasets` would clip 16-bit pictures to white and end the iteration at the first broken
file. The image column is the first one of type Image, or of raw bytes; the label column is `label` if there is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .sources import Source, as_labels

_TABLES = (".parquet", ".arrow")


class Table(Source):
    """A map-style Hugging Face data set."""

    def __init__(self, dataset: Any, image: str | None, label: str | None, title: str) -> None:
        from datasets import Image

        self.image = _image_column(dataset.features, image, title)
        label = _label_column(dataset.features, label, title)
        if label is not None:
            self._read_labels(dataset, label, title)
        dataset = dataset.select_columns([self.image])
        if isinstance(dataset.features[self.image], Image):  # a file may carry decode=True or False: say it
            dataset = dataset.cast_column(self.image, Image(decode=False))
        self.dataset, self.title = dataset, title
        if len(self) == 0:
            raise ValueError(f"{title} has no rows")
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> tuple[Any, int | None]:
        return payload(self.dataset[int(i)][self.image], self.name(i)), self.label(i)

    def name(self, i: int) -> str:
        return f"row {i} of {self.title}"

    def describe(self) -> str:
        classes = f", {len(self.class_names)} classes" if self.class_names else ""
        return f"{len(self):,} images in {self.title} (column {self.image!r}{classes})"

    def _read_labels(self, dataset: Any, label: str, title: str) -> None:
        values = dataset.with_format(None)[label][:]
        if any(value is None for value in values):
            raise ValueError(f"{title}: column {label!r} has rows without a label; choose another data.label")
        if not isinstance(values[0], (int, str)):
            raise ValueError(f"{title}: column {label!r} holds {type(values[0]).__name__}, labels are integers or text")
        self.labels, self.class_names = as_labels(values)
        self.class_names = getattr(dataset.features[label], "names", None) or self.class_names

    def _fingerprint(self) -> str:
        """Rows and a few contents: unlike `datasets`' own, the same after the files were moved."""
        digest = hashlib.blake2b(f"{len(self)} {self.image}".encode(), digest_size=16)
        for i in range(0, len(self), max(1, len(self) // 64)):
            digest.update(repr(self.dataset[i][self.image]).encode())
        return digest.hexdigest()


def payload(value: Any, name: str) -> Any:
    """What a row holds -> bytes, path or array."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError(f"{name} is empty")
    return value


def is_table(paths: Sequence[Path]) -> bool:
    """Parquet or arrow files, a folder of them, a `save_to_disk` folder, or nothing on this disk: a Hub name."""
    return all(_is_table(path) for path in paths)


def _is_table(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or bool(_table_files(path))
    if path.is_file():
        return path.suffix in _TABLES
    return _may_be_hub_name(path)


def _table_files(folder: Path) -> list[Path]:
    return sorted(file for place in (folder, folder / "data") for suffix in _TABLES for file in place.glob(f"*{suffix}"))


def _may_be_hub_name(path: Path) -> bool:
    text = path.as_posix()
    return len(path.parts) <= 2 and not path.is_absolute() and not text.startswith((".", "~")) and not path.suffix


def open_table(
    names: Sequence[str], *, split: str, config: str | None, revision: str | None, image: str | None, label: str | None
) -> Table:
    """Open files, a folder or a Hub name and pick the split."""
    title = ", ".join(names)
    loaded = _load(names, config, revision)
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(f"{title} has no split {split!r}; it has: {', '.join(loaded)}")
        loaded, title = loaded[split], f"{title}[{split}]"
    elif split != "train":
        raise ValueError(f"{title} has no splits, so only 'train' (everything); {split!r} was asked for")
    return Table(loaded, image, label, title)


def _load(names: Sequence[str], config: str | None, revision: str | None) -> Any:
    import datasets

    paths = [Path(name).expanduser() for name in names]
    try:
        if paths[0].is_file():
            return _load_files([str(path) for path in paths])
        if len(names) > 1:
            raise ValueError("name one data set; a list is for folders of images or for files")
        if any((paths[0] / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(str(paths[0]))
        return datasets.load_dataset(str(paths[0]) if paths[0].is_dir() else names[0], config, revision=revision)
    except (OSError, ValueError, RuntimeError) as problem:
        where = "" if paths[0].exists() else " (it is no folder or file here, so it was looked up on the Hub)"
        raise ValueError(f"data.source {', '.join(names)!r} cannot be opened{where}: {str(problem).splitlines()[0]}") from problem


def _load_files(files: list[str]) -> Any:
    import datasets

    if files[0].endswith(".arrow"):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    return datasets.load_dataset("parquet", data_files=files, split="train")


def _image_column(features: Mapping[str, Any], wanted: str | None, title: str) -> str:
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"{title} has no column {wanted!r} for data.image; it has: {', '.join(features)}")
        return wanted
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    for name, kind in kinds.items():
        if kind == "Image":
            return name
    for name, feature in features.items():
        if getattr(feature, "dtype", None) in ("binary", "large_binary") or (isinstance(feature, dict) and "bytes" in feature):
            return name
    raise ValueError(f"{title} has no image column; set data.image to one of: {', '.join(features)}")


def _label_column(features: Mapping[str, Any], wanted: str | None, title: str) -> str | None:
    if wanted is None:
        return "label" if "label" in features else None
    if wanted not in features:
        raise ValueError(f"{title} has no column {wanted!r} for data.label; it has: {', '.join(features)}")
    return wanted
