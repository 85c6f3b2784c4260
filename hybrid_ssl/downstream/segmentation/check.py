"""Looks at masks before a run: which ids they have, whether they fit their images, what is broken.

Reads a mask whole and of an image only its header, on some threads; a second for 2,500 scenes of 128 pixels.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ...data.decode import Decoder
from .labels import Labels, as_ids
from .layouts import Chosen, Pairs

_THREADS = 8
_NAMED = 3  # files named for each kind of problem
_KINDS = 8  # kinds of problems told
_SIZES = " pixels, the image "
_MOST_IDS = 1000  # more are instances or depth, not classes


@dataclass
class Looked:
    """What the masks of a split have.

    Attributes:
        rows: numbers of the pairs that were looked at.
        ids: of each of them; None where something is wrong.
        wrong: pair's number -> what.
    """

    rows: list[int]
    ids: list[frozenset[int] | None] = field(default_factory=list)
    wrong: dict[int, str] = field(default_factory=dict)

    def masks_with(self) -> Counter[int]:
        """Id -> in how many masks it is."""
        return Counter(i for ids in self.ids if ids is not None for i in ids)


def look(pairs: Pairs, decoder: Decoder, most: int | None) -> Looked:
    """Look at `most` masks, evenly spread over the list (None: at all)."""
    count = len(pairs) if most is None else min(most, len(pairs))
    rows = [i * len(pairs) // count for i in range(count)]
    looked = Looked(rows)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for row, found in zip(rows, pool.map(lambda i: _ids_of(pairs, decoder, i), rows), strict=True):
            looked.ids.append(found if isinstance(found, frozenset) else None)
            if isinstance(found, str):
                looked.wrong[row] = found
    return looked


def infer_classes(looked: Looked, ignore: Collection[int]) -> dict[int, str]:
    """The ids that masks have, called by their numbers; ValueError if these are hardly classes."""
    ids = sorted(looked.masks_with().keys() - set(ignore))
    if len(ids) > _MOST_IDS:
        raise ValueError(
            f"the masks have {len(ids):,} different ids (up to {ids[-1]}), which are hardly classes: are these "
            "instances or colours? Give the classes in data.classes, and what is no class in data.ignore"
        )
    return {i: str(i) for i in ids}


def sift(pairs: Pairs, looked: Looked, labels: Labels, split: str, limit: float) -> tuple[Pairs, list[str]]:
    """The pairs that can be used, and sentences about the others.

    Raises:
        ValueError: more than the share `limit` of those looked at are broken; with counts, names and what to do.
    """
    kinds: dict[str, list[int]] = {}
    for row, text in looked.wrong.items():
        kinds.setdefault("mask of another size than its image" if _SIZES in text else text, []).append(row)
    for row, ids in zip(looked.rows, looked.ids, strict=True):
        for i in sorted(ids or ()):
            if not labels.knows(i):
                kinds.setdefault(f"unknown class id {i}", []).append(row)
    wrong = {row for rows in kinds.values() for row in rows}
    said = _sentences(pairs, kinds, looked, split)
    if len(pairs.lonely) > 0:
        said.append(f"{split}: {len(pairs.lonely)} images have no mask and are left out, e.g. {_some(pairs.lonely)}")
    if len(wrong) > limit * len(looked.rows):
        raise ValueError(
            f"{len(wrong)} of {len(looked.rows)} {split} masks cannot be used, more than run.max_broken={limit:g}:\n  "
            + "\n  ".join(said)
            + f"\nids of classes: {shortened(labels.ids)}; what is no class belongs into data.ignore {labels.ignore}"
        )
    if pairs.spare:
        said.append(f"{split}: {pairs.spare} masks belong to no image")
    kept = [i for i in range(len(pairs)) if i not in wrong]
    return (Chosen(pairs, kept) if wrong else pairs), said


def disagreements(train: Looked, test: Looked, labels: Labels) -> list[str]:
    """Sentences about classes that only one of the splits has, among the masks looked at."""
    have = [looked.masks_with() for looked in (train, test)]
    said = []
    for here, there, text in ((1, 0, "no training mask has: {}, but test masks do"), (0, 1, "no test mask has: {}")):
        only = [name for i, name in zip(labels.ids, labels.names, strict=True) if have[here][i] and not have[there][i]]
        if only:
            said.append(text.format(_some(only, 10)))
    neither = [name for i, name in zip(labels.ids, labels.names, strict=True) if not have[0][i] and not have[1][i]]
    if neither:
        said.append(f"no mask that was looked at has: {_some(neither, 10)}")
    return said


def _ids_of(pairs: Pairs, decoder: Decoder, i: int) -> frozenset[int] | str:
    """The ids of one mask, or what is wrong."""
    try:
        ids = as_ids(decoder.stored(pairs.mask(i)))
    except ValueError as problem:
        return f"mask: {problem}"
    try:
        image = pairs.image(i)
        if _header_size(image) != ids.shape:  # turned by EXIF, or no file that PIL opens
            height, width = decoder(image).shape[-2:]
            if (height, width) != ids.shape:
                return f"mask is {ids.shape[0]} x {ids.shape[1]}{_SIZES}{height} x {width}"
    except ValueError as problem:
        return f"image: {problem}"
    if ids.dtype == np.uint8:
        return frozenset(np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist())
    return frozenset(np.unique(ids).tolist())


def _header_size(image: Any) -> tuple[int, int] | None:
    """(height, width) without decoding; None if that cannot be said."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            turned = opened.getexif().get(274, 1) >= 5  # orientation
            plain = opened.format in ("JPEG", "PNG", "WEBP", "BMP")
            return (opened.height, opened.width) if plain and not turned else None
    except Exception:  # parsers of 40 formats; the decoder says what is wrong
        return None


def _sentences(pairs: Pairs, kinds: dict[str, list[int]], looked: Looked, split: str) -> list[str]:
    """One for each kind of problem, with its number and some files."""
    said = []
    for kind, rows in sorted(kinds.items(), key=lambda item: -len(item[1])):
        detail = looked.wrong.get(rows[0], kind)
        detail = f" ({detail})" if detail != kind else ""
        said.append(f"{split}: {len(rows)} x {kind}: {_some([pairs.short(row) for row in rows])}{detail}")
    return said[:_KINDS] + [f"{split}: {len(said) - _KINDS} more kinds of problems"] * (len(said) > _KINDS)


def _some(names: Sequence[str], most: int = _NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shortened(ids: Sequence[int]) -> str:
    """Ids as text; many that follow each other as a range."""
    if len(ids) > 2 and list(ids) == list(range(ids[0], ids[-1] + 1)):
        return f"{ids[0]} .. {ids[-1]}"
    return ", ".join(map(str, ids)) or "none"
