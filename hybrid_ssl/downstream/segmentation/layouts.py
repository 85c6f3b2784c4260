"""Which image has which mask: the folder layouts of the well-known data sets, plain folders, and tables.

    folders      {train,val}/x.jpg              masks/{train,val}/x.png  (or images/{train,val}/; annotations/, labels/)
    ade20k       images/{training,validation}/  annotations/{training,validation}/      0 and 255 are no class
    voc          JPEGImages/x.jpg               SegmentationClass/x.png, ImageSets/Segmentation/{train,val}.txt
    cityscapes   leftImg8bit/train/*/x_leftImg8bit.png    gtFine/train/*/x_gtFine_labelIds.png    19 of 34 ids
    table        two columns of images

Pictures belong together when their paths below the two folders are equal up to the ending.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.files import Files, open_folders
from ...data.sources import NoSplit, open_named, printable
from ...data.tables import Table, is_table, payload
from .settings import SegmentationData

_SAME = (("train", "training"), ("val", "validation", "valid"))  # one split, several spellings
_MASKS = ("masks", "annotations", "labels")
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
_CITYSCAPES = {  # label id -> name of the 19 that are measured; the other ids of 0..33 and -1 are not
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


class Pairs:
    """Images and masks of one split, by number; undecoded."""

    lonely: list[str]
    """images without a mask, by their short names"""
    spare: int = 0
    """masks without an image"""
    fingerprint: str
    """differs when the list differs; a resumed run compares it"""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, i: int) -> str:
        raise NotImplementedError

    def short(self, i: int) -> str:
        """Its name without the folder of the data, for results that are shown to others."""
        raise NotImplementedError

    def image(self, i: int) -> Any:
        """A path, bytes or an array; ValueError if there is none."""
        raise NotImplementedError

    def mask(self, i: int) -> Any:
        """A path, bytes or an array; ValueError if there is none."""
        raise NotImplementedError


class FilePairs(Pairs):
    """Files in folders.

    Args:
        files: (image, mask) of each pair.
        keys: what identifies the images, wherever the folder was moved to.
    """

    def __init__(
        self, files: Sequence[tuple[str, str]], keys: Sequence[str], lonely: list[str], spare: int = 0
    ) -> None:
        self.files, self.keys, self.lonely, self.spare = list(files), list(keys), lonely, spare
        joined = b"\0".join(os.fsencode(key) for key in keys)
        self.fingerprint = hashlib.blake2b(joined, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return printable(self.files[i][0])

    def short(self, i: int) -> str:
        return printable(self.keys[i])

    def image(self, i: int) -> str:
        return self.files[i][0]

    def mask(self, i: int) -> str:
        return self.files[i][1]


class TablePairs(Pairs):
    """Rows with two image columns."""

    def __init__(self, table: Table, column: str) -> None:
        table.keep([column])
        self.table, self.column, self.lonely = table, column, []
        self.fingerprint = table.fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def name(self, i: int) -> str:
        return self.table.name(i)

    def short(self, i: int) -> str:
        return f"row {i}"

    def image(self, i: int) -> Any:
        return self.table.read(i)[0]

    def mask(self, i: int) -> Any:
        return payload(self.table.cell(i, self.column))


class Chosen(Pairs):
    """Some of the pairs, in their order."""

    def __init__(self, pairs: Pairs, rows: Sequence[int]) -> None:
        self.pairs, self.rows, self.lonely, self.spare = pairs, list(rows), pairs.lonely, pairs.spare
        self.fingerprint = f"{pairs.fingerprint}-{len(self.rows)}"

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.pairs.name(self.rows[i])

    def short(self, i: int) -> str:
        return self.pairs.short(self.rows[i])

    def image(self, i: int) -> Any:
        return self.pairs.image(self.rows[i])

    def mask(self, i: int) -> Any:
        return self.pairs.mask(self.rows[i])


@dataclass(frozen=True)
class Layout:
    """What was found at `data.source`.

    Attributes:
        kind: the layout's name.
        train, test: the pairs of both splits.
        classes: id -> name, where the layout knows them.
        ignore: ids of pixels without class.
    """

    kind: str
    train: Pairs
    test: Pairs
    classes: dict[int, str] | None = None
    ignore: frozenset[int] = field(default=frozenset({255}))


def open_layout(cfg: SegmentationData) -> Layout:
    """Find images and masks; ValueError with what is there and what is needed."""
    if not cfg.source:
        raise ValueError("data.source is empty: give the folder or data set with --data")
    kind = _detect(cfg) if cfg.layout == "auto" else cfg.layout
    if kind == "table":
        return Layout(kind, _table(cfg, cfg.train_split), _table(cfg, cfg.test_split))
    if cfg.image or cfg.mask:
        raise ValueError(
            f"data.image and data.mask name columns, but {cfg.source} has the layout {kind}: leave them out"
        )
    root = Path(cfg.source).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.source: {printable(str(root))} is no folder")
    if kind == "ade20k":
        train, test = (_folders(root / "images", root / "annotations", s) for s in (cfg.train_split, cfg.test_split))
        return Layout(kind, train, test, _ade_classes(root), frozenset({0, 255}))
    if kind == "voc":
        train, test = (_voc(root, split) for split in (cfg.train_split, cfg.test_split))
        return Layout(kind, train, test, dict(enumerate(_VOC)))
    if kind == "cityscapes":
        train, test = (_cityscapes(root, split) for split in (cfg.train_split, cfg.test_split))
        return Layout(kind, train, test, _CITYSCAPES, frozenset({-1, 255, *range(34)} - _CITYSCAPES.keys()))
    images, masks = _plain_roots(root)
    train, test = (_folders(images, masks, split) for split in (cfg.train_split, cfg.test_split))
    return Layout(kind, train, test)


def _detect(cfg: SegmentationData) -> str:
    root = Path(cfg.source).expanduser()
    if (root / "images" / "training").is_dir() and (root / "annotations" / "training").is_dir():
        return "ade20k"
    if (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir():
        return "voc"
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        return "cityscapes"
    if root.is_dir() and any((root / name).is_dir() for name in _MASKS):
        return "folders"
    if is_table(cfg.source):
        return "table"
    inside = ", ".join(sorted(entry.name for entry in root.iterdir())[:12]) if root.is_dir() else "not a folder"
    raise ValueError(
        f"no masks found at data.source {printable(cfg.source)} ({printable(inside)}); expected {{train,val}}/ beside "
        "masks/{train,val}/, the layout of ADE20K, VOC or Cityscapes, or a table with two image columns"
    )


def _plain_roots(root: Path) -> tuple[Path, Path]:
    """The folders that hold the splits of images and of masks."""
    masks = next((root / name for name in _MASKS if (root / name).is_dir()), None)
    if masks is None:
        raise ValueError(f"{printable(str(root))} has none of the folders {', '.join(_MASKS)}")
    return (root / "images" if (root / "images").is_dir() else root), masks


def _split_folder(root: Path, split: str) -> Path:
    spellings = next((names for names in _SAME if split in names), (split,))
    found = next((root / name for name in (split, *spellings) if (root / name).is_dir()), None)
    if found is None:
        raise NoSplit(printable(str(root)), split, sorted(e.name for e in root.iterdir() if e.is_dir()))
    return found


def _folders(image_root: Path, mask_root: Path, split: str) -> FilePairs:
    images = open_folders([_split_folder(image_root, split)], "train")
    return _matched(images, open_folders([_split_folder(mask_root, split)], "train"))


def _matched(images: Files, masks: Files, image_end: str = "", mask_ends: Sequence[str] = ("",)) -> FilePairs:
    """Pairs of files that are called alike, apart from their ends; earlier `mask_ends` go first."""
    by_stem: dict[str, str] = {}
    for end in reversed(mask_ends):
        by_stem |= {_stem(masks, j).removesuffix(end): masks.path(j) for j in range(len(masks)) if _ends(masks, j, end)}
    found, keys, lonely = [], [], []
    for i in range(len(images)):
        mask = by_stem.get(_stem(images, i).removesuffix(image_end))
        if mask is None:
            lonely.append(printable(images.key(i)))
        else:
            found.append((images.path(i), mask))
            keys.append(images.key(i))
    if not found:
        raise ValueError(
            f"none of {len(images)} images has a mask: {images.name(0)} and {masks.name(0)} have to be called "
            "alike, up to the ending"
        )
    return FilePairs(found, keys, lonely, len(by_stem) - len({mask for _, mask in found}))


def _stem(files: Files, i: int) -> str:
    return os.path.splitext(files.key(i))[0]


def _ends(files: Files, i: int, end: str) -> bool:
    return _stem(files, i).endswith(end)


def _voc(root: Path, split: str) -> FilePairs:
    lists = root / "ImageSets" / "Segmentation"
    file = lists / f"{split}.txt"
    if not file.is_file():
        raise NoSplit(printable(str(root)), split, sorted(f.stem for f in lists.glob("*.txt")))
    stems = file.read_text(encoding="utf-8").split()
    there = [stem for stem in stems if (root / "SegmentationClass" / f"{stem}.png").is_file()]
    if not there:
        raise ValueError(f"none of the {len(stems)} images of {printable(str(file))} has a mask in SegmentationClass")
    files = [
        (str(root / "JPEGImages" / f"{stem}.jpg"), str(root / "SegmentationClass" / f"{stem}.png")) for stem in there
    ]
    return FilePairs(files, there, sorted(set(stems) - set(there)))


def _cityscapes(root: Path, split: str) -> FilePairs:
    images = open_folders([_split_folder(root / "leftImg8bit", split)], "train")
    masks = open_folders([_split_folder(root / "gtFine", split)], "train")
    return _matched(images, masks, "_leftImg8bit", ("_gtFine_labelIds",))


def _ade_classes(root: Path) -> dict[int, str]:
    """150 classes; their names are in a table beside the images, `Idx Ratio Train Val Stuff Name`."""
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return {i: str(i) for i in range(1, 151)}
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    short = [row[-1].split(",")[0].strip() for row in rows]
    whole = [row[-1].strip() for row in rows]
    names = [one if short.count(one) == 1 else other for one, other in zip(short, whole, strict=True)]
    return {int(row[0]): name for row, name in zip(rows, names, strict=True)}


def _table(cfg: SegmentationData, split: str) -> TablePairs:
    spellings = next((names for names in _SAME if split in names), (split,))
    missing: NoSplit | None = None
    for name in dict.fromkeys((split, *spellings)):
        try:
            table = open_named(cfg.source, split=name, config=cfg.config, revision=cfg.revision, image=cfg.image)
        except NoSplit as problem:
            missing = missing or problem
            continue
        assert isinstance(table, Table)
        return TablePairs(table, cfg.mask or _mask_column(table))
    assert missing is not None
    raise missing


def _mask_column(table: Table) -> str:
    others = [name for name in table.image_columns() if name != table.image]
    if len(others) != 1:
        raise ValueError(
            f"{table.title} has {len(others)} image columns besides {table.image!r} ({', '.join(others) or 'none'}): "
            "set data.mask to the column of the label maps"
        )
    return others[0]
