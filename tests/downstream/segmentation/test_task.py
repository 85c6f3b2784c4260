"""The task as the command line runs it: trained, measured, stored, drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from hybrid_ssl.downstream.segmentation import SegmentationTask
from hybrid_ssl.downstream.segmentation.drawing import coloured, colours, comparison, painted
from hybrid_ssl.downstream.segmentation.metrics import IGNORED
from hybrid_ssl.downstream.stored import load_model
from hybrid_ssl.downstream.task import Batch
from tests.downstream.segmentation.made import make_folders, make_recipe, scene, write
from tests.downstream.tiny import export_tiny, finetune


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("encoder"), "vit", channels=1)


def test_a_run_learns_halves_and_leaves_numbers_a_picture_and_a_model(tmp_path: Path, encoder: Path) -> None:
    data = make_folders(tmp_path / "data", 24, 6)
    recipe = make_recipe(data, encoder, run={"length": "40 steps", "batch_size": 8, "out": str(tmp_path / "run")})
    raw = recipe.model_dump(mode="json", exclude={"encoder": {"name"}, "data": {"source"}})
    raw["optimizer"] |= {"lr": 1e-2, "layer_decay": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert finetune("segmentation", encoder, "--data", data, "--recipe", tmp_path / "recipe.yaml") == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["metric"] == "mIoU" and results["metrics"]["mIoU"] > 0.6
    assert results["metrics"].keys() >= {"IoU/0", "IoU/1", "IoU/2", "pixel_accuracy", "mean_accuracy"}
    assert str(tmp_path) not in json.dumps(results["data"])
    picture = np.asarray(Image.open(tmp_path / "run/predictions.png"))
    assert picture.ndim == 3 and picture.std() > 10
    model = load_model(tmp_path / "run")
    image, truth = scene(1003)
    found = model.predict(torch.from_numpy(image)[None])
    assert (found["labels"].numpy() == truth).mean() > 0.7


def test_measured_numbers_are_those_of_the_predictions(tmp_path: Path, encoder: Path) -> None:
    data = make_folders(tmp_path, 4, 3)
    write(data / "val/odd.png", data / "masks/val/odd.png", 7, height=20, width=28)  # sizes may differ in a batch
    task = SegmentationTask(make_recipe(data, encoder))
    task.model.eval()
    samples = [task.test.read(i, None) for i in range(len(task.test))]
    images, targets = task.collate(samples)
    assert isinstance(images, list)
    found = task.evaluate(task.model, [Batch(images, targets)], Accelerator(cpu=True))
    right = total = 0
    for image, truth in samples:
        labels = task.model.predict(image)["labels"]
        right, total = right + int((labels == truth).sum()), total + truth.numel()
    assert found["pixel_accuracy"] == pytest.approx(right / total)
    same = [Batch(*task.collate([sample])) for sample in samples]
    assert task.evaluate(task.model, same, Accelerator(cpu=True)) == found


def test_facts_tell_layout_origin_of_classes_and_problems_without_paths(tmp_path: Path, encoder: Path) -> None:
    data = make_folders(tmp_path, 6, 3)
    (data / "masks/train/2.png").unlink()
    facts = SegmentationTask(make_recipe(data, encoder)).facts()
    assert (facts["layout"], facts["training images"], facts["test images"], facts["classes"]) == ("folders", 5, 3, 3)
    assert "classes from the ids in 5 training masks, ignored ids: 255" in facts["remarks"]
    assert "1 images have no mask and are left out, e.g. 2.png" in facts["remarks"]
    assert str(tmp_path) not in json.dumps(facts)


def test_limit_takes_images_from_the_whole_list(tmp_path: Path, encoder: Path) -> None:
    task = SegmentationTask(make_recipe(make_folders(tmp_path, 8, 2), encoder, data={"limit": 4}))
    assert [Path(task.train.name(i)).stem for i in range(len(task.train))] == ["0", "2", "4", "6"]


def test_every_class_has_its_own_colour() -> None:
    palette = colours(60)
    assert len({tuple(row) for row in palette.tolist()}) == 61
    labels = torch.tensor([[0, 1], [IGNORED, 2]])
    assert torch.equal(coloured(labels)[:, 1, 0], palette[-1]) and torch.equal(coloured(labels)[:, 1, 1], palette[2])


def test_painting_leaves_ignored_pixels_and_tints_others() -> None:
    image = torch.full((1, 2, 2), 100, dtype=torch.uint8)
    out = painted(image, torch.tensor([[0, 1], [IGNORED, 2]]))
    assert out[:, 1, 0].tolist() == [100] * 3 and out[:, 0, 1].tolist() != [100] * 3


def test_the_sheet_has_a_legend_of_what_is_shown(tmp_path: Path) -> None:
    images = [torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(3, 64, 40, dtype=torch.uint8)]
    labels = [torch.zeros(20, 30, dtype=torch.long), torch.full((64, 40), 2)]
    few = comparison(images, labels, labels, ["sky", "tree", "car"])
    many = comparison(images, labels, [each * 0 + 1 for each in labels], [f"class {i}" * 9 for i in range(3)])
    assert few.width == many.width and few.height < many.height  # long names take more lines
    pixels = np.asarray(few).reshape(-1, 3)
    palette = colours(3).tolist()
    assert all((pixels == palette[k]).all(1).any() for k in (0, 2)) and not (pixels == palette[1]).all(1).any()
