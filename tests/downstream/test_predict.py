"""A stored model on a user's images: any size, broken ones named, predictions in forms that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hybrid_ssl.cli import main
from hybrid_ssl.downstream import predict as room
from hybrid_ssl.downstream.predict import predict

CLASSES = ["cat", "dog", "owl"]


class Fake(nn.Module):
    """What a fine-tuned model of a task answers, without its network."""

    classes = CLASSES

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = nn.Sequential(nn.Conv2d(3, 1, 1))

    def predict(self, image: Tensor) -> dict[str, Any]:
        height, width = image.shape[-2:]
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        if self.kind == "classification":
            return {"label": "dog", "probability": 0.75, "class": 1, "top": [["dog", 0.75], ["cat", 0.25]]}
        if self.kind == "segmentation":
            labels = torch.zeros(height, width, dtype=torch.int64)
            labels[:3] = 2
            return {"labels": labels, "share": {"cat": 0.9, "owl": 0.1}}
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 1:4, 2:5] = True
        boxes = torch.tensor([[2.0, 1.0, 5.0, 4.0], [0.0, 0.0, 6.0, 6.5]])
        return {"boxes": boxes, "labels": torch.tensor([2, 0]), "scores": torch.tensor([0.9, 0.3]), "masks": masks}

    def draw(self, image: Tensor, found: dict[str, Any]) -> Tensor:
        return image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of several sizes, one gray, one that is none, two of one name in two folders."""
    folder = tmp_path / "in"
    for name, size in {"a.jpg": (20, 30), "deep/a.png": (64, 17), "other/b.png": (9, 9)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if name == "other/b.png" else "RGB", size, 90).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


def run(kind: str, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(room, "load_model", lambda place: Fake(kind))
    return predict("unused", [str(pictures)], out, device="cpu")


def lines(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    return {row["image"]: row for row in rows}


def test_labels_and_the_next_best_of_all_that_can_be_read(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    told = run("classification", pictures, out, monkeypatch)
    assert "broken.jpg: is no image" in told and "3 images, 1 broken ones" in told
    rows = lines(out)
    assert rows.keys() == {"a.jpg", "deep/a.png", "other/b.png"}
    assert rows["a.jpg"]["label"] == "dog" and rows["a.jpg"]["top"][1] == ["cat", 0.25]
    with Image.open(out / "pictures" / "deep" / "a.png.png") as drawn:
        assert drawn.size == (64, 17)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["classes"] == CLASSES and list(summary["broken"].values()) == [
        "is no image that can be read (unknown format, or cut off in the header)"
    ]


def test_boxes_and_masks_are_cocos(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    out = tmp_path / "out"
    run("detection", pictures, out, monkeypatch)
    data = coco.COCO(str(out / "predictions.json"))
    assert [data.cats[i]["name"] for i in (1, 2, 3)] == CLASSES
    (image,) = [each for each in data.imgs.values() if each["file_name"] == "a.jpg"]
    assert (image["width"], image["height"]) == (20, 30)
    best, other = data.loadAnns(data.getAnnIds(imgIds=image["id"]))
    assert best["bbox"] == [2, 1, 3, 3] and best["category_id"] == 3 and best["score"] == 0.9
    assert other["bbox"] == [0, 0, 6, 6.5] and other["category_id"] == 1
    mask = data.annToMask(best)
    assert mask.shape == (30, 20) and mask.sum() == 9 and mask[1:4, 2:5].all()


@pytest.mark.parametrize(("score", "drawn"), [(None, 0.5), (0.2, 0.2)])
def test_a_score_decides_what_is_drawn_and_nothing_else(
    score: float | None, drawn: float, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Fake("detection")
    model.drawn = 0.5
    monkeypatch.setattr(room, "load_model", lambda place: model)
    predict("unused", [str(pictures / "a.jpg")], tmp_path / "out", device="cpu", score=score)
    assert model.drawn == drawn
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]) == 2


def test_class_maps_are_stored_as_numbers(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run("segmentation", pictures, out, monkeypatch)
    row = lines(out)["deep/a.png"]
    assert row["share"] == {"cat": 0.9, "owl": 0.1} and row["map"] == "maps/deep/a.png.png"
    with Image.open(out / row["map"]) as stored:
        numbers = np.array(stored)
    assert numbers.shape == (17, 64) and (numbers[:3] == 2).all() and not numbers[3:].any()


def test_single_files_may_share_a_name(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    monkeypatch.setattr(room, "load_model", lambda place: Fake("classification"))
    predict("unused", [str(pictures / "a.png"), str(pictures / "deep/a.png")], tmp_path / "out", device="cpu")
    assert lines(tmp_path / "out").keys() == {"000_a.png", "001_a.png"}
    predict("unused", [str(pictures / "a.png")], tmp_path / "one", device="cpu")
    assert lines(tmp_path / "one").keys() == {"a.png"}


def test_the_folder_has_to_be_new_and_something_readable(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "load_model", lambda place: Fake("classification"))
    with pytest.raises(ValueError, match="choose a new folder"):
        predict("unused", [str(pictures)], pictures, device="cpu")
    with pytest.raises(ValueError, match="none of the 1 images can be read.*broken.jpg"):
        predict("unused", [str(pictures / "broken.jpg")], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--score 0.3: .* only for a model of detection"):
        predict("unused", [str(pictures)], tmp_path / "out", device="cpu", score=0.3)
    with pytest.raises(ValueError, match="device 'tpu9' cannot be used"):
        predict("unused", [str(pictures)], tmp_path / "out", device="tpu9")


def test_a_folder_without_a_model_is_a_sentence(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["predict", str(pictures), str(pictures), "--out", str(tmp_path / "out")])
    assert code == 2 and "holds no fine-tuned model" in capsys.readouterr().err
