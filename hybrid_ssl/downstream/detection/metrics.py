"""COCO's average precision of boxes and masks, by pycocotools, over the predictions of all processes.

AP is the mean over IoU thresholds 0.50, 0.55, ... 0.95, 101 recalls and classes with objects (arXiv 1405.0312). Small,
medium and large are COCO's: below 32**2, below 96**2, and above, in pixels of the image. Crowd regions are ignored:
what is found in them is neither right nor wrong.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .coco import Coco
from .rle import to_rle

_KEYS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # COCOeval's first six
_RECALL = "AR100"  # its ninth: at most 100 predictions an image


class Found(NamedTuple):
    """Predictions on one image, as arrays that can travel between processes."""

    boxes: np.ndarray
    """float32 [n, 4] x1, y1, x2, y2"""
    labels: np.ndarray
    scores: np.ndarray
    masks: list[dict[str, Any]] | None
    """compressed run lengths"""


def average_precision(truth: Coco, found: Mapping[int, Found], masks: bool) -> dict[str, float]:
    """AP of predictions on the images `found` has, by their numbers; other images do not count.

    Returns:
        `AP`, `AP50`, `AP75`, `AP_small`, ..., `AR100`, `AP/NAME` of each class, in 0..1, and with `masks` the same
        once more as `mask AP`, ... What has no objects in the truth is left out; `AP` itself is NaN then.
    """
    out = _measure(truth, found, "bbox")
    if masks:
        out |= {f"mask {name}": value for name, value in _measure(truth, found, "segm").items()}
    return out


def _measure(truth: Coco, found: Mapping[int, Found], kind: Literal["bbox", "segm"]) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = sorted(found)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on every step
        reference: Any = COCO()
        reference.dataset = _dataset(truth, images, kind == "segm")
        reference.createIndex()
        rows = _rows(found, kind == "segm")
        results: Any = COCO()
        results.dataset = reference.dataset | {"annotations": []}
        results.createIndex()
        if rows:  # loadRes takes no empty list
            results = reference.loadRes(rows)
        judge = COCOeval(reference, results, kind)
        judge.params.imgIds = images
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    numbers = dict(zip(_KEYS, judge.stats[:6], strict=True)) | {_RECALL: judge.stats[8]}
    # precision: [thresholds, recalls, classes, sizes, limits of predictions]
    by_class = judge.eval["precision"][:, :, :, 0, -1]
    for label, name in enumerate(truth.classes):
        values = by_class[:, :, label]
        numbers[f"AP/{name}"] = values[values > -1].mean() if (values > -1).any() else -1
    kept = {name: float(value) for name, value in numbers.items() if value >= 0}  # -1: no objects of that kind
    return {"AP": math.nan} | kept


def _dataset(truth: Coco, images: Sequence[int], masks: bool) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for i in images:
        height, width = (int(side) for side in truth.sizes[i])
        for number in truth.of(i, crowd=True):
            x1, y1, x2, y2 = truth.boxes[number].tolist()
            one = {
                "id": len(annotations) + 1,  # 0 would count as unmatched
                "image_id": i,
                "category_id": int(truth.labels[number]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(truth.areas[number]),
                "iscrowd": int(truth.crowd[number]),
            }
            if masks:
                # a crowd region without a mask is its box
                segment = truth.segment(number) or [[x1, y1, x2, y1, x2, y2, x1, y2]]
                one["segmentation"] = to_rle(segment, height, width)
            annotations.append(one)
    return {
        "info": {},
        "images": [{"id": i, "height": int(truth.sizes[i][0]), "width": int(truth.sizes[i][1])} for i in images],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(truth.classes)],
    }


def _rows(found: Mapping[int, Found], masks: bool) -> list[dict[str, Any]]:
    rows = []
    for i, each in found.items():
        for n, (x1, y1, x2, y2) in enumerate(each.boxes.tolist()):
            row: dict[str, Any] = {
                "image_id": i,
                "category_id": int(each.labels[n]),
                "score": float(each.scores[n]),
            }
            if masks:
                assert each.masks is not None
                row["segmentation"] = each.masks[n]
            else:
                row["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            rows.append(row)
    return rows
