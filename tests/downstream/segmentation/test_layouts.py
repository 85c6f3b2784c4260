"""Every layout is found by itself, and gives the same scenes with their class numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.downstream.segmentation.labels import Labels, as_ids, ignored_ids, known_classes
from hybrid_ssl.downstream.segmentation.layouts import open_layout
from hybrid_ssl.downstream.segmentation.metrics import IGNORED
from hybrid_ssl.downstream.segmentation.samples import SegmentationSamples
from hybrid_ssl.downstream.segmentation.settings import SegmentationData
from tests.downstream.segmentation.made import SIDE, make_folders, scene, write


def opened(root: Path | str, **more: object) -> tuple[SegmentationSamples, SegmentationSamples, list[str], str]:
    """Training and test samples, class names, and the layout's name."""
    cfg = SegmentationData.model_validate({"source": str(root), "channels": 1} | more)
    layout = open_layout(cfg)
    classes, _ = known_classes(cfg, layout)
    labels = Labels(classes or {0: "0", 1: "1", 2: "2"}, ignored_ids(cfg, layout))
    return *(SegmentationSamples(p, Decoder(1), labels) for p in (layout.train, layout.test)), labels.names, layout.kind


def check(samples: SegmentationSamples, i: int, seed: int, numbers: list[int] | None = None) -> None:
    """Sample `i` is the scene of `seed`; `numbers` are the classes of its ids."""
    image, mask = samples.read(i, None)
    pixels, truth = scene(seed)
    assert image.dtype == torch.uint8 and image.shape == (1, SIDE, SIDE)
    assert np.array_equal(image[0].numpy(), pixels)
    assert np.array_equal(mask.numpy(), np.array(numbers or [0, 1, 2])[truth])


def test_plain_folders(tmp_path: Path) -> None:
    train, test, _, kind = opened(make_folders(tmp_path, 3, 2))
    assert kind == "folders" and len(train) == 3 and len(test) == 2
    check(train, 1, 1)
    check(test, 1, 1001)


def test_folders_with_images_below_images_and_other_words(tmp_path: Path) -> None:
    for word in ("training", "validation"):
        write(tmp_path / "images" / word / "a" / "x.png", tmp_path / "labels" / word / "a" / "x.tif", 5)
    train, test, _, kind = opened(tmp_path)
    assert kind == "folders"
    check(train, 0, 5)
    check(test, 0, 5)


def test_ade20k_skips_its_zero(tmp_path: Path) -> None:
    ids = np.array([0, 1, 150], dtype=np.uint8)
    for split in ("training", "validation"):
        write(tmp_path / "images" / split / "x.png", tmp_path / "annotations" / split / "x.png", 5, ids)
    table = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    table += [f"{i}\t0.1\t1\t1\t0\tthing {i}, object" for i in range(1, 149)]
    table += ["149\t0.1\t1\t1\t0\tscreen, silver", "150\t0.1\t1\t1\t0\tscreen, crt"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(table) + "\n")
    train, test, names, kind = opened(tmp_path)
    assert kind == "ade20k" and len(names) == 150
    assert names[0] == "thing 1" and names[148:] == ["screen, silver", "screen, crt"]
    check(train, 0, 5, [IGNORED, 0, 149])
    check(test, 0, 5, [IGNORED, 0, 149])


def test_voc_reads_its_lists_and_palettes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write(tmp_path / "JPEGImages" / f"{name}.png", tmp_path / "x" / f"{name}.png", seed)
        (tmp_path / "JPEGImages" / f"{name}.png").rename(tmp_path / "JPEGImages" / f"{name}.jpg")  # lossless
        palette = Image.fromarray(np.array([0, 20, 255], dtype=np.uint8)[scene(seed)[1]], mode="P")
        palette.putpalette([255, 0, 0] * 128 + [0, 7, 9] * 128)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        palette.save(tmp_path / "SegmentationClass" / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\na\n")
    (lists / "val.txt").write_text("b\n")
    train, test, names, kind = opened(tmp_path)
    assert kind == "voc" and names[0] == "background" and names[20] == "tvmonitor"
    check(train, 0, 3, [0, 20, IGNORED])
    check(test, 0, 2, [0, 20, IGNORED])
    with pytest.raises(ValueError, match="no split 'test'; it has: train, val"):
        opened(tmp_path, test_split="test")


def test_cityscapes_ids_become_train_ids(tmp_path: Path) -> None:
    for split in ("train", "val"):
        stem = f"{split}/town/town_000_019"
        image = tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png"
        write(image, tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", 5, np.array([7, 33, 4], dtype=np.uint8))
        write(tmp_path / "x.png", tmp_path / "gtFine" / f"{stem}_gtFine_instanceIds.png", 9)
        write(tmp_path / "x.png", tmp_path / "gtFine" / f"{stem}_gtFine_color.png", 9)
    train, _, names, kind = opened(tmp_path)
    assert kind == "cityscapes" and len(names) == 19 and (names[0], names[18]) == ("road", "bicycle")
    check(train, 0, 5, [0, 18, IGNORED])


@pytest.mark.parametrize("columns", [("image", "annotation"), ("photo", "seg")])
def test_tables_with_two_image_columns(tmp_path: Path, columns: tuple[str, str]) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({columns[0]: ImageFeature(), "words": Value("string"), columns[1]: ImageFeature()})
    for split, start in (("train", 0), ("validation", 1000)):
        rows = [{columns[0]: png(a), "words": "x", columns[1]: png(b)} for a, b in (scene(start + i) for i in range(3))]
        Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / f"{split}-0.parquet"))
    train, test, _, kind = opened(tmp_path)
    assert kind == "table" and len(train) == 3
    check(train, 2, 2)
    check(test, 1, 1001)
    with pytest.raises(ValueError, match="no column 'depth'"):
        opened(tmp_path, mask="depth")


def test_a_folder_without_masks_is_refused_with_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "train" / "x.png", tmp_path / "elsewhere" / "x.png", 1)
    with pytest.raises(ValueError, match=r"no masks found.*elsewhere, train.*masks/\{train,val\}"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="data.source is empty"):
        open_layout(SegmentationData())


def test_names_that_never_match_are_one_clear_error(tmp_path: Path) -> None:
    write(tmp_path / "train" / "x.png", tmp_path / "masks" / "train" / "x_mask.png", 1)
    with pytest.raises(ValueError, match="none of 1 images has a mask.*called"):
        opened(tmp_path)


def test_classes_from_a_list_a_text_file_and_json(tmp_path: Path) -> None:
    make_folders(tmp_path, 1, 1)
    assert opened(tmp_path, classes=["a", "b", "c"])[2] == ["a", "b", "c"]
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    assert opened(tmp_path)[2] == ["x", "y", "z"]
    (tmp_path / "other.json").write_text(json.dumps({"2": "two", "0": "zero", "1": "one"}))
    train, _, names, _ = opened(tmp_path, classes=str(tmp_path / "other.json"))
    assert names == ["two", "zero", "one"]
    check(train, 0, 0, [1, 2, 0])
    with pytest.raises(ValueError, match="no file nowhere.json"):
        opened(tmp_path, classes="nowhere.json")


def test_listed_names_skip_ignored_ids(tmp_path: Path) -> None:
    make_folders(tmp_path, 1, 1)
    train, _, _, _ = opened(tmp_path, classes=["a", "b"], ignore=[0, 255])
    check(train, 0, 0, [IGNORED, 0, 1])


def test_ids_may_be_deep_negative_or_gray_in_rgb() -> None:
    labels = Labels({7: "a", 40_000: "b"}, {-1})
    assert labels(np.array([[7, 40_000, -1]], dtype=np.int32)).tolist() == [[0, 1, IGNORED]]
    assert as_ids(np.full((2, 3, 3), 4, dtype=np.uint8)).tolist() == [[4, 4, 4]] * 2
    with pytest.raises(ValueError, match="colours has to be converted"):
        as_ids(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    with pytest.raises(ValueError, match="float32, class ids are integers"):
        as_ids(np.zeros((2, 2), dtype=np.float32))
    for ids in ([[7, 8]], [[7, 70_000]], [[7, -5]]):
        with pytest.raises(ValueError, match="no class and not in data.ignore"):
            labels(np.array(ids))


def test_black_and_white_masks_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"only one class.*set data.ignore to \[\]"):
        Labels({0: "0"}, {255})
    assert Labels({0: "0", 255: "255"}, ()).names == ["0", "255"]


def png(pixels: np.ndarray) -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue()}
