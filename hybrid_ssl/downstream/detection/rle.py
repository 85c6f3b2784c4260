"""Masks in COCO's three forms: polygons, and run lengths down the columns, plain or compressed.

pycocotools decodes and encodes; what it would read past the end of, or take for another picture, is refused before.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

NO_MASK = "objects without a mask"
BROKEN = "masks that cannot be read"
OTHER_SIZE = "masks of another size than their image"


def tools() -> Any:
    """pycocotools' functions for masks.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise ValueError("detection needs pycocotools: pip install 'hybrid-ssl[downstream]'") from None
    return mask


def mask_problem(segment: Any, height: int, width: int) -> str | None:
    """What is wrong with a segmentation of an image of this size; None: nothing that can be seen without decoding."""
    if not segment:
        return NO_MASK
    if isinstance(segment, list):
        fine = all(isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0 for ring in segment)
        return None if fine and all(_is_number(value) for ring in segment for value in ring) else BROKEN
    if not isinstance(segment, dict) or "counts" not in segment or "size" not in segment:
        return BROKEN
    if segment["size"] != [height, width]:
        return OTHER_SIZE
    counts = segment["counts"]
    if isinstance(counts, str):
        counts = unpacked(counts)
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        return BROKEN
    return None if sum(counts) == height * width else OTHER_SIZE


def unpacked(text: str) -> list[int] | None:
    """Run lengths out of COCO's compressed text; None if it is none.

    Numbers of 5 bits a character, lowest first, bit 6: more follow; from the fourth on each is the difference to the
    one before the last. pycocotools checks no sum: of too short a text it returns memory that was never written.
    """
    values = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) - 48
    if not len(values) or values.min() < 0 or values.max() > 63 or values[-1] & 32:
        return None
    last = np.flatnonzero(values & 32 == 0)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(values)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # more than 2**35
        return None
    runs = np.add.reduceat((values & 31) << 5 * place, first)
    runs -= np.where(values[last] & 16, np.int64(1) << 5 * (place[last] + 1), 0)  # the last one's bit 5 is the sign
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return [int(run) for run in runs]


def to_rle(segment: Any, height: int, width: int) -> dict[str, Any]:
    """Any of COCO's forms -> its compressed run lengths."""
    mask = tools()
    if isinstance(segment, list):
        return dict(mask.merge(mask.frPyObjects(segment, height, width)))
    if isinstance(segment["counts"], list):
        return dict(mask.frPyObjects(segment, height, width))
    return {"size": segment["size"], "counts": segment["counts"].encode()}


def to_mask(segment: Any, height: int, width: int) -> np.ndarray:
    """uint8 [H, W]; ValueError if the compressed run lengths are broken."""
    try:
        return np.asarray(tools().decode(to_rle(segment, height, width)))
    except (RuntimeError, ValueError, MemoryError) as problem:
        raise ValueError(f"a mask cannot be decoded: {problem}") from problem


def encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """uint8 [n, H, W] -> compressed run lengths."""
    return list(tools().encode(np.asfortranarray(masks.transpose(1, 2, 0)))) if len(masks) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
