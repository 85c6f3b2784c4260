"""Classes of two splits are brought together by name; what does not fit is counted and named, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from datasets import Dataset

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.downstream.classification.samples import LabelledImages, centre, open_parts
from hybrid_ssl.downstream.classification.settings import ClassificationData
from tests.downstream.classification.made import COLOURS, write_classes


def opened(source: Any, **more: Any) -> Any:
    return open_parts(ClassificationData(source=str(source), **more))


def test_the_test_set_is_the_folder_beside_train(tmp_path: Path) -> None:
    parts = opened(write_classes(tmp_path, {"train": 4, "val": 2, "test": 1}))
    assert parts.classes == sorted(COLOURS) and not parts.problems
    assert (len(parts.train.rows), len(parts.test.rows)) == (12, 6)
    assert "val" in parts.test.source.name(0)
    assert len(opened(tmp_path, test_split="test").test.rows) == 3


def test_a_test_set_with_fewer_classes_is_numbered_as_training(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 2, "val": 2})
    shutil.rmtree(tmp_path / "val" / "blue")
    parts = opened(tmp_path)
    named = [parts.test.source.name(int(row)).split("/")[-2] for row in parts.test.rows]
    assert [parts.classes[label] for label in parts.test.labels] == named == ["green"] * 2 + ["red"] * 2


def test_classes_that_training_lacks_are_left_out_counted_and_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 2, "val": 3})
    shutil.rmtree(tmp_path / "train" / "green")
    parts = opened(tmp_path)
    assert parts.problems == ["3 test images of classes that training lacks are left out: green"]
    assert parts.test.labels.tolist() == [0] * 3 + [1] * 3 and parts.classes == ["blue", "red"]


def test_splits_without_a_common_class_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 1})
    write_classes(tmp_path, {"val": 1}, {"cat": (0, 0, 0), "dog": (9, 9, 9)})
    with pytest.raises(ValueError, match="no class of the test set.*cat, dog instead of blue, green, red"):
        opened(tmp_path)


def test_without_a_test_set_it_says_what_to_do_and_holds_out_when_told(tmp_path: Path) -> None:
    root = write_classes(tmp_path, {".": 10})
    with pytest.raises(ValueError, match="no test set.*data.test_source.*data.hold_out"):
        opened(root)
    parts = opened(root, hold_out=0.2)
    learnt, tested = set(parts.train.rows.tolist()), set(parts.test.rows.tolist())
    assert len(tested) == 6 and len(learnt) == 24 and not learnt & tested
    assert torch.equal(opened(root, hold_out=0.2).test.rows, parts.test.rows)


def test_pictures_without_labels_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train": 2, "val": 2}, {"blue": (0, 0, 9)})
    with pytest.raises(ValueError, match="classification needs labels"):
        opened(tmp_path)


def test_tables_name_their_classes_and_negative_numbers_mean_no_label(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    pictures = [path.read_bytes() for path in sorted(write_classes(tmp_path / "p", {"train": 2}).rglob("*.png"))]
    for split, labels in {"train": [7, 7, 30, 30, -1, 7], "test": [30, 7, 7, 30, 30, 7]}.items():
        Dataset.from_dict({"photo": pictures, "kind": labels}).to_parquet(tmp_path / "d" / f"{split}.parquet")
    parts = opened(tmp_path / "d", image="photo", label="kind")
    assert parts.classes == ["7", "30"] and parts.train.labels.tolist() == [0, 0, 1, 1, 0]
    assert parts.test.labels.tolist() == [1, 0, 0, 1, 1, 0] and parts.train.rows.tolist() == [0, 1, 2, 3, 5]
    assert parts.problems == ["1 training images without label (a negative number) are left out"]


def test_limits_draw_over_all_classes(tmp_path: Path) -> None:
    parts = opened(write_classes(tmp_path, {"train": 20, "val": 20}), limit=15, test_limit=12)
    assert len(parts.train.labels) == 15 and len(set(parts.train.labels.tolist())) == 3
    assert len(parts.test.labels) == 12 and len(set(parts.test.labels.tolist())) == 3


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{p}\t0\n" for p in write_classes(tmp_path, {"t": 1}).rglob("*.png")))
    with pytest.raises(ValueError, match="one class"):
        opened(tmp_path / "list.txt", hold_out=0.5)


def test_a_broken_picture_says_why(tmp_path: Path) -> None:
    root = write_classes(tmp_path, {"train": 2, "val": 1})
    (root / "train" / "blue" / "00.png").write_bytes(b"no picture")
    part = opened(root).train
    samples = LabelledImages(*part, Decoder(3), (16, 16), 1.0, lambda image, rng: image)
    with pytest.raises(ValueError, match="no image"):
        samples.read(0, Random(0))
    assert samples.read(1, None)[0].shape == (3, 16, 16) and "00.png" in samples.name(0)


def test_centre_is_the_inner_part() -> None:
    image = torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:40] = 200
    assert (centre(image, (10, 10), 0.5) == 200).all()
    assert not (centre(image, (10, 10), 1.0) == 200).all()
