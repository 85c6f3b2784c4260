"""COCO's JSON as it comes: three forms of masks, crowd, and every fault named and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as official

from hybrid_ssl.downstream.detection.coco import Coco, read_coco
from hybrid_ssl.downstream.detection.rle import BROKEN, NO_MASK, OTHER_SIZE, mask_problem, to_mask, unpacked
from tests.downstream.detection.made import annotation, coco, counts_of, scene, write


def read(root: Path, content: dict[str, Any], masks: bool = True, classes: list[str] | None = None) -> Coco:
    return read_coco(write(root, "train", content), masks=masks, classes=classes)


def test_all_three_forms_of_masks_are_read(tmp_path: Path) -> None:
    content = coco(1)
    square = np.zeros((32, 32), np.uint8)
    square[4:12, 6:20] = 1
    plain = {"size": [32, 32], "counts": counts_of(square)}
    packed = official.encode(np.asfortranarray(square))
    polygon = [[6, 4, 20, 4, 20, 12, 6, 12]]
    forms = [plain, {"size": [32, 32], "counts": packed["counts"].decode()}, polygon]
    content["annotations"] = [annotation(i, 0, 0, square, segmentation=form) for i, form in enumerate(forms)]
    found = read(tmp_path, content)
    for number in found.of(0):
        assert np.array_equal(found.mask(0, number), square)


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_are_unpacked_as_pycocotools_packs_them(seed: int) -> None:
    mask = (np.random.default_rng(seed).random((37, 53)) < 0.1 * (seed + 1)).astype(np.uint8)
    assert unpacked(official.encode(np.asfortranarray(mask))["counts"].decode()) == counts_of(mask)
    text = official.encode(np.asfortranarray(np.ones((3000, 4000), np.uint8)))["counts"].decode()
    assert unpacked(text) == [0, 12_000_000]


def test_crowd_is_kept_for_the_measure_and_not_trained_on(tmp_path: Path) -> None:
    content = coco(2)
    content["annotations"][0]["iscrowd"] = 1
    found = read(tmp_path, content)
    assert len(found.of(0)) == len(found.of(0, crowd=True)) - 1
    assert found.crowd.sum() == 1


def test_annotations_go_to_their_images_in_any_order(tmp_path: Path) -> None:
    content = coco(4)
    plain = read(tmp_path, content)
    content["annotations"].reverse()
    turned = read(tmp_path, content)
    for i in range(4):
        assert sorted(map(tuple, plain.boxes[plain.of(i)])) == sorted(map(tuple, turned.boxes[turned.of(i)]))
    only = plain.keep([2, 0])
    assert only.files == ["2.png", "0.png"]
    assert np.array_equal(only.boxes[only.of(0)], plain.boxes[plain.of(2)])
    assert np.array_equal(only.mask(1, only.of(1)[0]), plain.mask(0, plain.of(0)[0]))
    assert only.fingerprint != plain.fingerprint


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"image_id": 77}, "of an image that is not listed"),
    ({"image_id": None}, "of an image that is not listed"),
    ({"category_id": 99}, "of a category that is not listed"),
    ({"bbox": [1, 2, 3]}, "not four numbers"),
    ({"bbox": None}, "not four numbers"),
    ({"bbox": [1, 2, float("nan"), 3]}, "not four numbers"),
    ({"bbox": [5, 5, 0, 4]}, "empty boxes"),
    ({"bbox": [5, 5, -3, 4]}, "empty boxes"),
    ({"bbox": [40, 5, 6, 4]}, "boxes outside their image"),
    ({"segmentation": {"size": [16, 64], "counts": [1024]}}, OTHER_SIZE),
    ({"segmentation": {"size": [32, 32], "counts": [5, 7]}}, OTHER_SIZE),
    ({"segmentation": {"size": [32, 32], "counts": "garbage~"}}, BROKEN),
    ({"segmentation": {"size": [32, 32], "counts": "0001"}}, OTHER_SIZE),
    ({"segmentation": [[1, 2, 3, 4]]}, BROKEN),
    ({"segmentation": []}, NO_MASK),
    ({"segmentation": None}, NO_MASK),
]


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=[str(change) for change, _ in FAULTS])
def test_a_fault_is_left_out_named_and_counted(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = coco(2)
    whole = read(tmp_path, content)
    content["annotations"][0] |= change
    found = read(tmp_path, content)
    assert len(found.boxes) == len(whole.boxes) - 1
    assert words in str(found.problems) and "1 " in str(found.problems)
    assert "annotation 1" in str(found.problems)


def test_a_box_over_the_border_is_clipped_and_counted(tmp_path: Path) -> None:
    content = coco(1)
    content["annotations"][0]["bbox"] = [-6, 20, 20, 30]
    found = read(tmp_path, content)
    assert [0, 20, 14, 32] in found.boxes.tolist()
    assert "clipped" in str(found.problems)
    content["annotations"][0]["bbox"] = [-0.3, 20, 20, 12.4]  # rounding
    assert not read(tmp_path, content).problems.counts


def test_faults_of_masks_do_not_matter_where_none_are_learned(tmp_path: Path) -> None:
    content = coco(1)
    for one in content["annotations"]:
        one["segmentation"] = []
    found = read(tmp_path, content, masks=False)
    assert len(found.boxes) == len(content["annotations"]) and not found.problems.counts
    with pytest.raises(ValueError, match="none of 2 annotations can be used.*2 objects without a mask"):
        read(tmp_path, content, masks=True)


def test_classes_are_known_by_name(tmp_path: Path) -> None:
    content = coco(2)
    first = read(tmp_path, content)
    content["categories"] = [{"id": 20, "name": "square"}, {"id": 10, "name": "disc"}]  # numbered otherwise
    other = read(tmp_path, content, classes=first.classes)
    assert other.classes == first.classes and np.array_equal(other.labels, 1 - first.labels)


def test_classes_that_training_does_not_have_are_refused(tmp_path: Path) -> None:
    content = coco(2)
    content["categories"].append({"id": 30, "name": "zebra"})
    assert read(tmp_path, content, classes=["square", "disc"]).classes == ["square", "disc"]  # no object of it
    content["annotations"][0]["category_id"] = 30
    with pytest.raises(ValueError, match=r"'zebra' \(1 annotations\); training has: square, disc"):
        read(tmp_path, content, classes=["square", "disc"])


def broken(change: Any) -> dict[str, Any]:
    content = coco(1)
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (broken(lambda c: c.pop("annotations")), "no list annotations"),
        (broken(lambda c: c["annotations"].clear()), "none of 0 annotations"),
        (broken(lambda c: c["images"][0].pop("file_name")), "no id and file_name"),
        (broken(lambda c: c["images"][0].pop("width")), "no height and width"),
        (broken(lambda c: c["images"].append(c["images"][0])), "image id 0 is listed twice"),
        (broken(lambda c: c["categories"].append(c["categories"][0])), "listed twice"),
        (broken(lambda c: c["categories"][0].pop("name")), "no id and name"),
        ([1, 2], "not in COCO's format"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, content)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_coco(tmp_path / "no.json", masks=False)
    (tmp_path / "half.json").write_text(json.dumps(coco(1))[:-20])
    with pytest.raises(ValueError, match="is no JSON"):
        read_coco(tmp_path / "half.json", masks=False)


def test_a_good_mask_has_no_problem() -> None:
    for _, mask in scene(3)[1]:
        segment = {"size": [32, 32], "counts": counts_of(mask)}
        assert mask_problem(segment, 32, 32) is None
        assert np.array_equal(to_mask(segment, 32, 32), mask)
