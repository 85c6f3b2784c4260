"""Average precision: counted by hand, as pycocotools gives it directly, and from several processes."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hybrid_ssl.downstream.detection.coco import Coco, read_coco
from hybrid_ssl.downstream.detection.metrics import Found, average_precision
from hybrid_ssl.downstream.detection.rle import encode
from tests.downstream.detection.made import coco, write


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Found:
    """Predictions with masks that fill their boxes."""
    masks = np.zeros((len(boxes), 32, 32), np.uint8)
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        masks[row, int(y1) : int(y2), int(x1) : int(x2)] = 1
    return Found(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, int), np.array(scores), encode(masks))


def truth_of(tmp_path: Path, boxes: list[list[int]], crowd: int | None = None) -> Coco:
    """Objects of the first class in image 0; image 1 has one of the second class, image 2 none."""
    content: dict[str, Any] = coco(3)
    masks = np.zeros((len(boxes) + 1, 32, 32), np.uint8)
    for row, (x1, y1, x2, y2) in enumerate([*boxes, [4, 4, 20, 20]]):
        masks[row, y1:y2, x1:x2] = 1
    packed = encode(masks)
    content["annotations"] = [
        {
            "id": row + 1, "image_id": int(row == len(boxes)), "category_id": 20 if row == len(boxes) else 10,
            "iscrowd": int(row == crowd), "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
            "segmentation": {"size": [32, 32], "counts": packed[row]["counts"].decode()},
        }
        for row, (x1, y1, x2, y2) in enumerate([*boxes, [4, 4, 20, 20]])
    ]  # fmt: skip
    return read_coco(write(tmp_path, "val", content), masks=True)


def test_perfect_predictions_have_one_and_none_have_zero(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [[2, 2, 12, 12], [20, 20, 30, 30]])
    right = {
        0: found([[2, 2, 12, 12], [20, 20, 30, 30]], [0, 0], [0.9, 0.8]),
        1: found([[4, 4, 20, 20]], [1], [0.7]),
        2: found([], [], []),
    }
    numbers = average_precision(truth, right, masks=True)
    for key in ("AP", "AP50", "mask AP", "AP/square", "mask AP/disc", "AR100"):
        assert numbers[key] == pytest.approx(1)
    assert "AP_large" not in numbers  # there is no such object
    nothing = dict.fromkeys(range(3), found([], [], []))
    assert average_precision(truth, nothing, masks=True)["AP"] == 0


def test_ap_of_one_half_recall_is_counted_by_hand(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [[2, 2, 12, 12], [20, 20, 30, 30]])
    half = {0: found([[2, 2, 12, 12]], [0], [0.9]), 1: found([[4, 4, 20, 20]], [1], [0.7])}
    numbers = average_precision(truth, half, masks=False)
    assert math.isclose(numbers["AP/square"], 51 / 101)  # precision 1 at the recalls 0, 0.01, ..., 0.50
    # a box of 10 x 8 over one of 10 x 10: IoU 0.8 is enough for the thresholds 0.50 to 0.80, seven of ten
    half[0] = found([[2, 2, 12, 10]], [0], [0.9])
    assert math.isclose(average_precision(truth, half, masks=False)["AP/square"], 0.7 * 51 / 101, rel_tol=1e-6)


def test_false_positives_of_empty_images_count_and_other_images_do_not(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [[2, 2, 12, 12]])
    sure = {0: found([[2, 2, 12, 12]], [0], [0.8]), 2: found([[1, 1, 9, 9]], [0], [0.9])}
    assert math.isclose(average_precision(truth, sure, masks=False)["AP/square"], 0.5)
    assert "AP/disc" not in average_precision(truth, sure, masks=False)  # image 1 was not tested


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [[2, 2, 12, 12], [14, 0, 32, 32]], crowd=1)
    inside = {0: found([[16, 4, 22, 12], [24, 20, 30, 28], [2, 2, 12, 12]], [0] * 3, [0.9, 0.85, 0.8])}
    numbers = average_precision(truth, inside, masks=True)
    assert numbers["AP/square"] == pytest.approx(1) and numbers["mask AP/square"] == pytest.approx(1)


def test_nothing_to_measure_is_no_number(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [[2, 2, 12, 12]])
    assert math.isnan(average_precision(truth, {2: found([], [], [])}, masks=False)["AP"])


def noisy(truth: Coco, seed: int) -> dict[int, Found]:
    """The truth with moved boxes, wrong classes, and boxes that are not there."""
    rng = np.random.default_rng(seed)
    out = {}
    for i in range(len(truth)):
        numbers = truth.of(i)
        boxes = truth.boxes[numbers] + rng.normal(0, 1.5, (len(numbers), 4))
        boxes = np.concatenate([boxes, [[2, 2, 9, 20]] if i % 3 == 0 else np.zeros((0, 4))]).clip(0, 32)
        labels = np.concatenate([truth.labels[numbers], [0] if i % 3 == 0 else []]).astype(int)
        labels = np.where(rng.random(len(labels)) < 0.2, 1 - labels, labels)
        out[i] = found(boxes.round(2).tolist(), labels.tolist(), rng.random(len(labels)).round(3).tolist())
    return out


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_numbers_are_those_of_pycocotools(tmp_path: Path, kind: str) -> None:
    content = coco(12)
    content["annotations"][3]["iscrowd"] = 1
    file = write(tmp_path, "val", content)
    truth = read_coco(file, masks=True)
    predictions = noisy(truth, 1)
    numbers = average_precision(truth, predictions, masks=True)
    rows: list[dict[str, Any]] = []
    for i, each in predictions.items():
        assert each.masks is not None
        for box, label, score, mask in zip(each.boxes.tolist(), each.labels, each.scores, each.masks, strict=True):
            row = {"image_id": i, "category_id": 10 * (int(label) + 1), "score": float(score)}
            x1, y1, x2, y2 = box
            rows.append(row | ({"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "bbox" else {"segmentation": mask}))
    with contextlib.redirect_stdout(io.StringIO()):
        reference: Any = COCO(str(file))
        judge = COCOeval(reference, reference.loadRes(rows), kind)  # type: ignore[arg-type]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    prefix = "" if kind == "bbox" else "mask "
    assert 0.05 < numbers[f"{prefix}AP"] < 0.95
    assert numbers[f"{prefix}AP"] == pytest.approx(judge.stats[0], abs=1e-12)
    assert numbers[f"{prefix}AP50"] == pytest.approx(judge.stats[1], abs=1e-12)
    assert numbers[f"{prefix}AR100"] == pytest.approx(judge.stats[8], abs=1e-12)
