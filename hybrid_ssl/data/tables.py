"""Tables of Hugging Face `datasets`: Hub names, parquet and arrow files, `save_to_disk` folders.

Images are read undecoded: `datasets` would clip 16-bit pictures to white and end the iteration at the first broken
file. The image column is the first one of type Image, or of raw bytes; the label column is `label` if there is one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import EXTENSIONS
from .sources import Images, NoSplit, as_labels

_TABLES = (".parquet", ".arrow")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Table(Images):
    """A map-style Hugging Face data set."""

    def __init__(self, dataset: Any, image: str | None, label: str | None, title: str) -> None:
        dataset, self.image, label = find_columns(dataset, image, label, title)
        if label is not None:
            self._read_labels(dataset, label, title)
        self.dataset, self.title = dataset.select_columns([self.image]), title
        self._whole, self._columns = dataset, dict[str, Any]()
        if len(self) == 0:
            raise ValueError(f"{title} has no rows")
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> tuple[Any, int | None]:
        return payload(self.dataset[int(i)][self.image]), self.label(i)

    def keep(self, columns: Sequence[str]) -> None:
        from datasets import Image

        for column in columns:
            features = self._whole.features
            if column not in features:
                raise ValueError(f"{self.title} has no column {column!r}; it has: {', '.join(features)}")
            alone = self._whole.select_columns([column])
            raw = isinstance(features[column], Image)
            self._columns[column] = alone.cast_column(column, Image(decode=False)) if raw else alone

    def cell(self, i: int, column: str) -> Any:
        return self._columns[column][int(i)][column]

    def image_columns(self) -> list[str]:
        """The columns that hold images, by their type."""
        return [name for name, feature in self._whole.features.items() if type(feature).__name__ == "Image"]

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


def find_columns(dataset: Any, image: str | None, label: str | None, title: str) -> tuple[Any, str, str | None]:
    """The data set with undecoded images, and the names of the image and the label column."""
    from datasets import Image

    features = dataset.features
    image, label = _image_column(features, image, title), _label_column(features, label, title)
    if isinstance(features[image], Image):  # a file may carry decode=True or False: say it
        dataset = dataset.cast_column(image, Image(decode=False))
    return dataset, image, label


def payload(value: Any) -> Any:
    """What a row holds -> bytes, path or array."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise ValueError("is empty")
    return value


def is_table(name: str) -> bool:
    """A parquet or arrow file, a folder of them, a `save_to_disk` folder, or what may be a name on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _is_saved(path) or bool(_table_files(path))
    if path.suffix in (*_TABLES, ".txt", ".tar"):
        return path.suffix in _TABLES and path.is_file()
    return not path.exists() and bool(_HUB_NAME.fullmatch(name))


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _table_files(folder: Path) -> list[Path]:
    """Parquet and arrow files in `folder` and `folder/data`; none where pictures lie beside them."""
    inside = [file for place in (folder, folder / "data") for file in sorted(place.glob("*"))]
    if any(file.suffix.lower() in EXTENSIONS for file in inside):
        return []
    return [file for file in inside if file.suffix in _TABLES and file.stem != "metadata"]


def open_table(
    names: Sequence[str], *, split: str, config: str | None, revision: str | None, image: str | None, label: str | None
) -> Table:
    """Open files, a folder or a Hub name and pick the split."""
    title = ", ".join(names)
    loaded = load(names, config, revision, streaming=False)
    title_of_split = f"{title}[{split}]" if isinstance(loaded, Mapping) else title
    return Table(pick_split(loaded, split, title), image, label, title_of_split)


def pick_split(loaded: Any, split: str, title: str) -> Any:
    """The data set itself if it has no splits."""
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise NoSplit(title, split, loaded)
        return loaded[split]
    if split != "train":
        raise NoSplit(title, split, ())
    return loaded


def load(names: Sequence[str], config: str | None, revision: str | None, streaming: bool) -> Any:
    """A data set, or a mapping from split to data set.

    Raises:
        ValueError: with what `datasets` or the Hub had to say, in one line.
    """
    title = ", ".join(names)
    paths = [Path(name).expanduser() for name in names]
    where = "" if paths[0].exists() else " (there is no such file or folder, so it was looked up on the Hub)"
    try:
        if paths[0].is_file():
            return _load_files({"train": paths}, streaming)["train"]
        if len(names) > 1:
            raise ValueError("name one data set; a list is for folders of images or for files")
        if paths[0].is_dir():
            return _load_folder(paths[0], config, streaming)
        return _load_hub(title, config, revision, streaming)
    except Exception as problem:  # arrow, HTTP, file system and parser errors have no base in common
        reason = (str(problem).strip().splitlines() or [repr(problem)])[0]
        raise ValueError(f"data.source {title!r} cannot be opened{where}: {reason}") from problem


def _load_folder(folder: Path, config: str | None, streaming: bool) -> Any:
    import datasets

    if _is_saved(folder):
        loaded = datasets.load_from_disk(str(folder))
        if not streaming:
            return loaded
        to_stream = lambda one: one.to_iterable_dataset(num_shards=min(64, len(one)))  # noqa: E731
        return {k: to_stream(v) for k, v in loaded.items()} if isinstance(loaded, Mapping) else to_stream(loaded)
    card = folder / "README.md"
    if card.is_file() and card.read_bytes()[:4] == b"---\n":  # a clone of a Hub repository may define its splits there
        return datasets.load_dataset(str(folder), config, streaming=streaming)
    files = _table_files(folder)
    splits: dict[str, list[Path]] = {}
    for file in files:  # train-00000-of-00004.parquet
        splits.setdefault(re.split(r"[-_.]", file.stem)[0], []).append(file)
    named = splits.keys() <= {"train", "validation", "val", "valid", "test"}
    return _load_files(splits, streaming) if named else _load_files({"train": files}, streaming)["train"]


def _load_files(splits: Mapping[str, Sequence[Path]], streaming: bool) -> Any:
    import datasets

    kinds = {file.suffix for files in splits.values() for file in files}
    if len(kinds) > 1 or not kinds <= set(_TABLES):
        raise ValueError(f"files of one kind are needed, parquet or arrow; got {', '.join(sorted(kinds))}")
    if kinds == {".arrow"} and not streaming:  # memory-mapped where they are
        load_each = datasets.Dataset.from_file
        return {k: datasets.concatenate_datasets([load_each(str(f)) for f in files]) for k, files in splits.items()}
    names = {split: [str(file) for file in files] for split, files in splits.items()}
    return datasets.load_dataset(kinds.pop()[1:], data_files=names, streaming=streaming)


def _load_hub(name: str, config: str | None, revision: str | None, streaming: bool) -> Any:
    """Ask the Hub once; without an answer, only the cache is looked at (`datasets` would retry for half a minute)."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except RepositoryNotFoundError:
        raise ValueError("the Hub has no such data set, or not for you (`hf auth login` if it is gated)") from None
    except (HFValidationError, HfHubHTTPError):
        raise
    except Exception:  # no network; the HTTP library's errors differ between its versions
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, config, revision=revision, streaming=streaming)
    except ConnectionError:
        raise ValueError("the Hub cannot be reached, and the cache has no copy") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


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
        if getattr(feature, "dtype", None) in ("binary", "large_binary"):
            return name
        if isinstance(feature, dict) and "bytes" in feature:
            return name
    raise ValueError(f"{title} has no image column; set data.image to one of: {', '.join(features)}")


def _label_column(features: Mapping[str, Any], wanted: str | None, title: str) -> str | None:
    if wanted is None:
        return "label" if "label" in features else None
    if wanted not in features:
        raise ValueError(f"{title} has no column {wanted!r} for data.label; it has: {', '.join(features)}")
    return wanted
