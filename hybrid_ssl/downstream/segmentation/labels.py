"""Class ids of stored label maps -> class numbers 0..K-1, and the names of the classes.

A map holds ids, whatever the file: palette PNGs their indices, 16 bits, arrays; gray that was saved as RGB is read,
colours are not. Each id is a class, is ignored, or is unknown, which makes the map a broken one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...data.sources import printable
from .layouts import Layout
from .metrics import IGNORED
from .settings import SegmentationData

_UNKNOWN = -2
_FILES = ("classes.txt", "classes.json")


class Labels:
    """The classes of a data set.

    Args:
        classes: id -> name, in the order of the class numbers.
        ignore: ids of pixels without class.

    Raises:
        ValueError: an id is both, or there are fewer than two classes.
    """

    def __init__(self, classes: Mapping[int, str], ignore: Collection[int]) -> None:
        self.ids, self.names, self.ignore = list(classes), list(classes.values()), sorted(ignore)
        both = set(self.ids) & set(ignore)
        if both:
            raise ValueError(
                f"ids {sorted(both)} are classes and are in data.ignore {self.ignore}: they cannot be both"
            )
        if len(self.ids) < 2:
            raise ValueError(
                f"there is only one class ({', '.join(self.names) or 'none'}) besides data.ignore {self.ignore}: if "
                "255 is a class, as in black and white masks, set data.ignore to []"
            )
        self._first = min(0, *self.ids, *self.ignore)
        size = max(255, *self.ids, *self.ignore) - self._first + 1
        self._numbers = np.full(size, _UNKNOWN, dtype=np.int16)
        self._numbers[np.array(self.ignore, dtype=int) - self._first] = IGNORED
        self._numbers[np.array(self.ids) - self._first] = np.arange(len(self.ids))

    def __call__(self, ids: np.ndarray) -> Tensor:
        """Ids [H, W] -> class numbers, int16 [H, W], IGNORED where there is none; ValueError for unknown ids."""
        numbers = self._look_up(ids)
        wrong = numbers == _UNKNOWN
        if wrong.any():
            strange = np.unique(ids[wrong])[:5].tolist()
            raise ValueError(f"has pixels with ids {strange}, which are no class and not in data.ignore")
        return torch.from_numpy(numbers)

    def knows(self, id: int) -> bool:
        return id in self.ids or id in self.ignore

    def _look_up(self, ids: np.ndarray) -> np.ndarray:
        if ids.dtype == np.uint8:
            found: np.ndarray = self._numbers[ids if self._first == 0 else ids.astype(np.int64) - self._first]
            return found
        place = ids.astype(np.int64) - self._first
        outside = (place < 0) | (place >= len(self._numbers))
        return np.where(outside, np.int16(_UNKNOWN), self._numbers[np.where(outside, 0, place)])


def as_ids(pixels: np.ndarray) -> np.ndarray:
    """Stored numbers -> ids [H, W]; ValueError for colours and for what is no map of integers."""
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[-1]):
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[-1] in (3, 4) and (pixels[..., :3] == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2 or pixels.size == 0:
        raise ValueError(
            f"its mask is {list(pixels.shape)}: class ids are [H, W]; a mask of colours has to be converted to ids"
        )
    if not np.issubdtype(pixels.dtype, np.integer) and pixels.dtype != np.bool_:
        raise ValueError(f"its mask holds {pixels.dtype}, class ids are integers")
    return pixels.astype(np.uint8) if pixels.dtype == np.bool_ else pixels


def known_classes(cfg: SegmentationData, layout: Layout) -> tuple[dict[int, str] | None, str]:
    """Id -> name as the recipe, a file or the layout says, and where they are from; None: nobody says."""
    ignore = ignored_ids(cfg, layout)
    if isinstance(cfg.classes, list):
        return _numbered(cfg.classes, ignore), "data.classes"
    files = [Path(cfg.classes).expanduser()] if cfg.classes else [Path(cfg.source).expanduser() / f for f in _FILES]
    found = next((file for file in files if file.is_file()), None)
    if found is not None:
        return _from_file(found, ignore), found.name
    if cfg.classes:
        raise ValueError(f"data.classes: there is no file {printable(str(cfg.classes))}; give one, or a list of names")
    return layout.classes, f"the layout {layout.kind}"


def ignored_ids(cfg: SegmentationData, layout: Layout) -> frozenset[int]:
    return layout.ignore if cfg.ignore is None else frozenset(cfg.ignore)


def _numbered(names: Collection[str], ignore: Collection[int]) -> dict[int, str]:
    """The first ids that are not ignored."""
    ids = (i for i in range(len(names) + len(ignore)) if i not in ignore)
    return dict(zip(ids, names, strict=False))


def _from_file(file: Path, ignore: Collection[int]) -> dict[int, str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return _numbered([line.strip() for line in text.splitlines() if line.strip()], ignore)
    try:
        read = json.loads(text)
        if isinstance(read, dict):
            return {int(key): str(name) for key, name in read.items()}
        if isinstance(read, list) and all(isinstance(name, str) for name in read):
            return _numbered(read, ignore)
    except ValueError as error:
        raise ValueError(f"{printable(str(file))}: {error}; it should be a list of names, or {{id: name}}") from error
    raise ValueError(f"{printable(str(file))} should be a list of names, or {{id: name}}")
