"""Boxes and masks in COCO's JSON format, checked as they are read, and kept small.

What cannot be used is left out, named and counted: annotations of images or categories that are not listed, boxes that
are empty or lie outside, and, where masks are learned, masks that are missing, broken or of another size. Boxes that
reach over the border are clipped. Crowd regions (`iscrowd`) are kept for the measure, which ignores predictions in
them, and never trained on, as in COCO's own rules. Classes are known by name, so two splits may number them otherwise.

All annotations stand in a few arrays, segmentations as packed JSON: lists of a million Python objects would be copied
into every loader process by the reference counts that reading changes.

Shapes: M annotations of all images, n of one; boxes are [x1, y1, x2, y2] in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .rle import mask_problem, to_mask

_CUT = 1.0  # pixels over the border that are rounding, not an error: COCO's own boxes have fractions


@dataclass
class Problems:
    """What was found to be wrong: kind -> how often, and the first case."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, example: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, example)

    def __str__(self) -> str:
        return "; ".join(f"{count:,} {kind} (first: {self.first[kind]})" for kind, count in self.counts.items())


@dataclass
class Coco:
    """The annotations of one split.

    Attributes:
        classes: names in the order of labels 0, 1, ...
        files: of the images, as the JSON file names them.
        sizes: [N, 2] height and width of the images.
        begins: [N + 1] where an image's annotations begin in the arrays below.
        boxes, labels, crowd, areas: float32 [M, 4], int64 [M], bool [M], float64 [M].
        problems: what was left out.
    """

    classes: list[str]
    files: list[str]
    sizes: np.ndarray
    begins: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    problems: Problems
    _segments: bytes
    _ends: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def of(self, i: int, crowd: bool = False) -> np.ndarray:
        """Numbers of the annotations of image `i`, without crowd regions unless they are wanted."""
        numbers = np.arange(self.begins[i], self.begins[i + 1])
        return numbers if crowd else numbers[~self.crowd[numbers]]

    def segment(self, number: int) -> Any:
        """Segmentation of an annotation as in the file; None if it has none that can be used."""
        return json.loads(self._segments[self._ends[number] : self._ends[number + 1]])

    def mask(self, i: int, number: int) -> np.ndarray:
        """uint8 [H, W] of an annotation of image `i`; ValueError if it cannot be decoded."""
        height, width = self.sizes[i]
        return to_mask(self.segment(number), int(height), int(width))

    @property
    def fingerprint(self) -> str:
        """Equal for equal images' names, sizes, classes and boxes."""
        digest = hashlib.blake2b("\0".join([*self.classes, "", *self.files]).encode(errors="replace"), digest_size=16)
        for array in (self.sizes, self.begins, self.boxes, self.labels, self.crowd):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def keep(self, images: Sequence[int]) -> Coco:
        """The same with these images alone."""
        numbers = np.concatenate([self.of(i, crowd=True) for i in images] or [np.arange(0)])
        texts = [self._segments[self._ends[n] : self._ends[n + 1]] for n in numbers]
        counts = [self.begins[i + 1] - self.begins[i] for i in images]
        return Coco(
            self.classes,
            [self.files[i] for i in images],
            self.sizes[list(images)],
            np.cumsum([0, *counts]),
            self.boxes[numbers],
            self.labels[numbers],
            self.crowd[numbers],
            self.areas[numbers],
            self.problems,
            *_pack(texts),
        )


def read_coco(file: Path, *, masks: bool, classes: Sequence[str] | None = None) -> Coco:
    """Read one split.

    Args:
        masks: whether objects without a usable mask are left out.
        classes: those of the training split; None: the file's own, in the order of their ids.

    Raises:
        ValueError: no such file, it is not COCO's format, its classes are not those of training, or nothing is left.
    """
    content = _load(file)
    label_of, names = _categories(file, content["categories"], content["annotations"], classes)
    index, files, sizes = _images(file, content["images"])
    reader = _Reader(index, sizes, label_of, masks)
    rows = sorted((row for row in map(reader.row, content["annotations"]) if row), key=lambda row: row.image)
    if all(row.crowd for row in rows):
        found = f": {reader.problems}" if reader.problems.counts else ""
        raise ValueError(f"{file.name}: none of {len(content['annotations']):,} annotations can be used{found}")
    counts = np.bincount([row.image for row in rows], minlength=len(files))
    return Coco(
        names,
        files,
        np.array(sizes, np.int64),
        np.concatenate([[0], np.cumsum(counts)]),
        np.array([row.box for row in rows], np.float32).reshape(-1, 4),
        np.array([row.label for row in rows], np.int64),
        np.array([row.crowd for row in rows], bool),
        np.array([row.area for row in rows], np.float64),
        reader.problems,
        *_pack([row.segment for row in rows]),
    )


class Row(NamedTuple):
    """One annotation that can be used."""

    image: int
    box: list[float]
    label: int
    crowd: bool
    area: float
    segment: bytes
    """JSON"""


class _Reader:
    """Turns annotations into rows (image, box, label, crowd, area, segmentation), or into a counted problem."""

    def __init__(
        self, index: Mapping[Any, int], sizes: Sequence[tuple[int, int]], labels: Mapping[Any, int], masks: bool
    ) -> None:
        self.index, self.sizes, self.labels, self.masks = index, sizes, labels, masks
        self.problems = Problems()

    def row(self, raw: Any) -> Row | None:
        """One annotation; None: it cannot be used, which was counted."""
        name = f"annotation {raw.get('id', '?')}" if isinstance(raw, dict) else ""
        wrong = self._reference_problem(raw, name)
        if wrong:
            self.problems.note(*wrong)
            return None
        image, label = self.index[raw["image_id"]], self.labels[raw["category_id"]]
        box = self._box(raw.get("bbox"), *self.sizes[image], name)
        if box is None:
            return None
        crowd, segment = bool(raw.get("iscrowd", 0)), raw.get("segmentation")
        broken = mask_problem(segment, *self.sizes[image])
        if broken and self.masks and not crowd:
            self.problems.note(broken, name)
            return None
        given = raw.get("area")
        area = float(given) if _is_number(given) and given > 0 else (box[2] - box[0]) * (box[3] - box[1])
        return Row(image, box, label, crowd, area, json.dumps(None if broken else segment).encode())

    def _reference_problem(self, raw: Any, name: str) -> tuple[str, str] | None:
        if not isinstance(raw, dict):
            return "annotations that are no mappings", str(raw)[:120]
        if not _is_key(raw.get("image_id")) or raw["image_id"] not in self.index:
            return "annotations of an image that is not listed", f"{name}, image {raw.get('image_id')}"
        if not _is_key(raw.get("category_id")) or raw["category_id"] not in self.labels:
            return "annotations of a category that is not listed", f"{name}, category {raw.get('category_id')}"
        return None

    def _box(self, raw: Any, height: int, width: int, name: str) -> list[float] | None:
        """[x1, y1, x2, y2] inside the image; None: there is none, which was counted."""
        where = f"{name}, {str(raw)[:80]} in {width} x {height}"
        if not isinstance(raw, list) or len(raw) != 4 or not all(map(_is_number, raw)):
            self.problems.note("boxes that are not four numbers", where)
            return None
        x, y, w, h = map(float, raw)
        if w <= 0 or h <= 0:
            self.problems.note("empty boxes", where)
            return None
        box = [max(0.0, x), max(0.0, y), min(width, x + w), min(height, y + h)]
        if box[2] <= box[0] or box[3] <= box[1]:
            self.problems.note("boxes outside their image", where)
            return None
        if min(x, y) < -_CUT or x + w > width + _CUT or y + h > height + _CUT:
            self.problems.note("boxes that were clipped to their image", where)
        return box


def _load(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as problem:
        raise ValueError(f"{file} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise ValueError(f"{file} is no JSON: {problem}") from problem
    keys = ("images", "annotations", "categories")
    lacking = [key for key in keys if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise ValueError(f"{file} is not in COCO's format: it has no list {' and no list '.join(lacking)}")
    return content


def _categories(
    file: Path, raw: Sequence[Any], annotations: Sequence[Any], classes: Sequence[str] | None
) -> tuple[dict[Any, int], list[str]]:
    """(category id -> label, names in the order of labels)."""
    named: dict[Any, str] = {}
    for entry in raw:
        if not isinstance(entry, dict) or not _is_key(entry.get("id")) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{file.name}: category {entry!r} has no id and name")
        if entry["id"] in named or entry["name"] in named.values():
            raise ValueError(f"{file.name}: category {entry['id']} {entry['name']!r} is listed twice")
        named[entry["id"]] = entry["name"]
    if classes is None:
        try:
            ordered = dict(sorted(named.items()))
        except TypeError:  # numbers and text
            ordered = named
        return {key: label for label, key in enumerate(ordered)}, list(ordered.values())
    used = [a.get("category_id") for a in annotations if isinstance(a, dict)]
    strangers = {name: used.count(key) for key, name in named.items() if name not in classes}
    if any(strangers.values()):
        shown = ", ".join(f"{name!r} ({count} annotations)" for name, count in strangers.items() if count)
        raise ValueError(
            f"{file.name} has classes that training does not have: {shown}; training has: {', '.join(classes)}. "
            "Give both splits the same category names"
        )
    return {key: classes.index(name) for key, name in named.items() if name in classes}, list(classes)


def _images(file: Path, raw: Sequence[Any]) -> tuple[dict[Any, int], list[str], list[tuple[int, int]]]:
    """(image id -> number, file names, (height, width))."""
    index: dict[Any, int] = {}
    files: list[str] = []
    sizes: list[tuple[int, int]] = []
    for entry in raw:
        if not isinstance(entry, dict) or not _is_key(entry.get("id")) or not isinstance(entry.get("file_name"), str):
            raise ValueError(f"{file.name}: image {str(entry)[:120]} has no id and file_name")
        sides = entry.get("height"), entry.get("width")
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"{file.name}: image {entry['id']} ({entry['file_name']}) has no height and width")
        if entry["id"] in index:
            raise ValueError(f"{file.name}: image id {entry['id']} is listed twice; whose annotations are these?")
        index[entry["id"]] = len(files)
        files.append(entry["file_name"])
        sizes.append((int(sides[0]), int(sides[1])))  # type: ignore[arg-type]
    return index, files, sizes


def _is_key(value: Any) -> bool:
    return isinstance(value, (int, str))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pack(texts: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    return b"".join(texts), np.cumsum([0, *map(len, texts)])
