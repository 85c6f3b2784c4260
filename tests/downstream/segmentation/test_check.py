"""Broken data: each case is named, counted, and left out or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.downstream.segmentation.check import disagreements, infer_classes, look, sift
from hybrid_ssl.downstream.segmentation.labels import Labels
from hybrid_ssl.downstream.segmentation.layouts import Pairs, open_layout
from hybrid_ssl.downstream.segmentation.samples import SegmentationSamples
from hybrid_ssl.downstream.segmentation.settings import SegmentationData
from tests.downstream.segmentation.made import make_folders, scene, write

LABELS = Labels({0: "sky", 1: "tree", 2: "car"}, {255})


def train_of(root: Path) -> Pairs:
    return open_layout(SegmentationData(source=str(root), channels=1)).train


def sifted(root: Path, limit: float = 0.5) -> tuple[Pairs, list[str]]:
    pairs = train_of(root)
    return sift(pairs, look(pairs, Decoder(1), None), LABELS, "train", limit)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folders(tmp_path, 10, 4)


def test_good_data_says_nothing(root: Path) -> None:
    pairs, said = sifted(root, limit=0)
    assert len(pairs) == 10 and said == []


def test_image_without_mask_and_mask_without_image(root: Path) -> None:
    (root / "masks/train/3.png").unlink()
    (root / "train/5.png").unlink()
    pairs, said = sifted(root, limit=0)
    assert len(pairs) == 8
    assert said == ["train: 1 images have no mask and are left out, e.g. 3.png", "train: 1 masks belong to no image"]


def test_mask_of_another_size(root: Path) -> None:
    Image.fromarray(np.zeros((8, 16), dtype=np.uint8)).save(root / "masks/train/4.png")
    pairs, said = sifted(root)
    assert len(pairs) == 9 and pairs.name(4).endswith("5.png")
    assert said == ["train: 1 x mask of another size than its image: 4.png (mask is 8 x 16 pixels, the image 16 x 16)"]
    with pytest.raises(ValueError, match="8 x 16 pixels, the image 16 x 16"):
        SegmentationSamples(train_of(root), Decoder(1), LABELS).read(4, None)


def test_a_turned_photo_fits_its_mask(root: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.fromarray(np.zeros((20, 10), dtype=np.uint8)).save(root / "train/4.jpg", exif=exif)
    (root / "train/4.png").unlink()
    Image.fromarray(np.zeros((10, 20), dtype=np.uint8)).save(root / "masks/train/4.png")
    assert sifted(root)[1] == []


def test_unknown_ids_are_counted_for_each_id(root: Path) -> None:
    for i, ids in ((2, [0, 9, 2]), (6, [9, 9, 7])):
        Image.fromarray(np.array(ids, dtype=np.uint8)[scene(i)[1]]).save(root / f"masks/train/{i}.png")
    there = [set(np.asarray(Image.open(root / f"masks/train/{i}.png")).ravel().tolist()) for i in (2, 6)]
    pairs, said = sifted(root)
    assert len(pairs) == 10 - sum(bool(ids & {7, 9}) for ids in there)
    nines = [f"{i}.png" for i, ids in zip((2, 6), there, strict=True) if 9 in ids]
    assert f"train: {len(nines)} x unknown class id 9: {', '.join(nines)}" in said


def test_what_cannot_be_decoded(root: Path) -> None:
    whole = (root / "masks/train/1.png").read_bytes()
    (root / "masks/train/1.png").write_bytes(whole[:40])
    (root / "train/2.png").write_bytes(b"no picture")
    pairs, said = sifted(root)
    assert len(pairs) == 8 and len(said) == 2
    assert any("x mask: is no image" in text and "1.png" in text for text in said)
    assert any("x image: is no image" in text and "2.png" in text for text in said)


def test_too_many_broken_ones_are_one_error_that_says_what_to_do(root: Path) -> None:
    for i in range(4):
        Image.fromarray(np.full((16, 16), 8, dtype=np.uint8)).save(root / f"masks/train/{i}.png")
    with pytest.raises(ValueError) as problem:
        sifted(root, limit=0.1)
    text = str(problem.value)
    assert "4 of 10 train masks cannot be used, more than run.max_broken=0.1" in text
    assert "4 x unknown class id 8: 0.png, 1.png, 2.png and 1 more" in text
    assert "ids of classes: 0 .. 2" in text and "data.ignore [255]" in text


def test_classes_that_only_one_split_has_are_told(tmp_path: Path) -> None:
    one, two = np.array([0, 1, 0], dtype=np.uint8), np.array([0, 2, 0], dtype=np.uint8)
    for i in range(12):
        write(tmp_path / f"train/{i}.png", tmp_path / f"masks/train/{i}.png", i, one)
        write(tmp_path / f"val/{i}.png", tmp_path / f"masks/val/{i}.png", i, two)
    layout = open_layout(SegmentationData(source=str(tmp_path), channels=1))
    train, test = (look(pairs, Decoder(1), None) for pairs in (layout.train, layout.test))
    labels = Labels({0: "sky", 1: "tree", 2: "car", 3: "cow"}, {255})
    assert disagreements(train, test, labels) == [
        "no training mask has: car, but test masks do",
        "no test mask has: tree",
        "no mask that was looked at has: cow",
    ]


def test_classes_are_the_ids_of_all_masks_without_the_ignored(root: Path) -> None:
    looked = look(train_of(root), Decoder(1), None)
    assert infer_classes(looked, {255}) == {0: "0", 1: "1", 2: "2"}
    assert infer_classes(looked, {0}) == {1: "1", 2: "2"}


def test_instances_are_no_classes(tmp_path: Path) -> None:
    make_folders(tmp_path, 1, 1, height=40, width=40)
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(tmp_path / "masks/train/0.png")
    with pytest.raises(ValueError, match="1,599 different ids.*instances"):
        infer_classes(look(train_of(tmp_path), Decoder(1), None), {255})


def test_a_sample_of_masks_is_spread_over_the_list(root: Path) -> None:
    assert look(train_of(root), Decoder(1), 4).rows == [0, 2, 5, 7]
