"""The task as the command line runs it: trained, measured, stored, drawn; bad data; two processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from hybrid_ssl.downstream.detection import DetectionTask
from hybrid_ssl.downstream.stored import load_model
from hybrid_ssl.downstream.task import Batch
from hybrid_ssl.downstream.tasks import read_task_recipe
from tests.downstream.detection.made import coco, make_coco, make_recipe, scene, write
from tests.downstream.tiny import export_tiny, finetune
from tests.ranks import run_two_ranks


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("encoder") / "vit", "vit", channels=1, size=32)


def test_a_run_learns_and_leaves_numbers_a_picture_and_a_model(tmp_path: Path, encoder: Path) -> None:
    data = make_coco(tmp_path / "data", train=16, test=4, objects=1)
    recipe = make_recipe(
        data,
        encoder,
        "faster_rcnn",
        run={"length": "30 steps", "batch_size": 8, "workers": 0, "out": str(tmp_path / "run")},
        optimizer={"lr": 1e-2, "lr_per": 8, "layer_decay": None},
    )
    raw = recipe.model_dump(mode="json", exclude={"encoder": {"name"}, "data": {"source"}})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert finetune("detection", encoder, "--data", data, "--recipe", tmp_path / "recipe.yaml") == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["metric"] == "AP" and results["metrics"]["AP50"] > 0.1
    assert results["metrics"].keys() >= {"AP/square", "AP/disc"}
    assert results["data"]["training images"] == 16 and str(tmp_path) not in json.dumps(results["data"])
    assert np.asarray(Image.open(tmp_path / "run/predictions.png")).std() > 10
    model: Any = load_model(tmp_path / "run")
    found = model.predict(torch.from_numpy(scene(1000, objects=1)[0])[None])
    assert model.classes == ["square", "disc"] and set(found["names"]) <= set(model.classes)


def test_masks_are_drawn_beside_the_truth(tmp_path: Path, encoder: Path) -> None:
    task = DetectionTask(make_recipe(make_coco(tmp_path, 4, 3), encoder, model={"score": 0.0}))
    task.draw(task.model.eval(), tmp_path / "out/picture.png")
    image = np.asarray(Image.open(tmp_path / "out/picture.png"))
    assert image.shape[1] > 2 * 384
    # truth is tinted: gray scenes have no colour of their own
    assert (image.max(-1).astype(int) - image.min(-1) > 60).mean() > 0.005


def test_missing_and_broken_images_are_named_by_their_samples(tmp_path: Path, encoder: Path) -> None:
    data = make_coco(tmp_path, 6, 3)
    (data / "train/1.png").unlink()
    (data / "train/2.png").write_bytes(b"no picture")
    Image.new("L", (20, 32)).save(data / "train/3.png")
    task = DetectionTask(make_recipe(data, encoder))
    for number, words in ((1, "cannot be read"), (2, "no image"), (3, "is 20 x 32 pixels, its annotations are for 32")):
        assert task.train.name(number) == f"{number}.png"
        with pytest.raises(ValueError, match=words):
            task.train.read(number, None)
    assert task.train.read(0, None)[0].shape == (1, 32, 32)


def refused(data: Path, encoder: Path, words: str, /, **sections: Any) -> None:
    with pytest.raises(ValueError, match=words):
        DetectionTask(make_recipe(data, encoder, **sections))


def test_data_that_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path, encoder: Path) -> None:
    data = make_coco(tmp_path / "data", 3, 2)
    refused(tmp_path / "no", encoder, "is no folder")
    refused(tmp_path, encoder, "has no train annotations: looked for annotations/instances_train2017.json")
    refused(data, encoder, "data.val: .* is no file", data={"val": "none.json"})
    refused(data, encoder, "data.train_images: .*none has none of the images", data={"train_images": "none"})
    refused(data, encoder, "strides", model={"strides": [3, 6]})
    refused(data, encoder, "model.anchors: 3 lists of equal length", model={"anchors": [[8.0]]})
    content = coco(2)
    for one in content["annotations"]:
        one["image_id"] = 5000
    write(data, "train", content)
    refused(data, encoder, "none of 4 annotations can be used: 4 annotations of an image that is not listed")


@pytest.mark.parametrize("layout", ["2017", "roboflow", "images"])
def test_usual_layouts_are_found(tmp_path: Path, encoder: Path, layout: str) -> None:
    data = make_coco(tmp_path, 3, 2)
    if layout == "roboflow":
        (data / "val").rename(data / "valid")
        for old, new in (("train", "train"), ("val", "valid")):
            (data / f"annotations/instances_{old}.json").rename(data / new / "_annotations.coco.json")
    else:
        (data / "images").mkdir()
        for split in ("train", "val"):
            year = "2017" if layout == "2017" else ""
            (data / split).rename(data / (f"{split}2017" if year else f"images/{split}"))
            (data / f"annotations/instances_{split}.json").rename(data / f"annotations/instances_{split}{year}.json")
    task = DetectionTask(make_recipe(data, encoder))
    assert (len(task.train), len(task.test)) == (3, 2)
    assert task.train.read(0, None)[0].shape == task.test.read(0, None)[0].shape


def test_empty_images_and_the_limit_are_as_the_recipe_says(tmp_path: Path, encoder: Path) -> None:
    data = make_coco(tmp_path, 5, 2)
    content = coco(5)
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 1]
    write(data, "train", content)
    sizes = [
        len(DetectionTask(make_recipe(data, encoder, data=section)).train)
        for section in ({}, {"empty_images": False}, {"limit": 2})
    ]
    assert sizes == [5, 4, 2]


def in_one_rank(data: str, encoder: str) -> dict[str, Any]:
    """Measure a share of the test set; then train on an empty batch in one of two processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    AcceleratorState._reset_state(reset_partial_state=True)
    # as a launcher sets them; Accelerate finds the group that is there
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in names.items()} if world > 1 else {})
    accelerator = Accelerator(cpu=True)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, world)
    task = DetectionTask(make_recipe(Path(data), encoder, model={"score": 0.0}))
    ids = tuple(range(rank, len(task.test), world))
    images, targets = task.collate([task.test.read(i, None) for i in ids])
    numbers = task.evaluate(task.model.eval(), [Batch(images, targets, ids)], accelerator)
    if world == 1:
        return {"numbers": numbers}
    model = DistributedDataParallel(task.model.train())
    images, targets = task.collate([task.train.read(i, None) for i in range(2)])
    targets = [{**target, "masks": torch.ones(len(target["boxes"]), 32, 32, dtype=torch.uint8)} for target in targets]
    if rank:
        targets = [{name: value[:0] for name, value in target.items()} for target in targets]
    norms = []
    for _ in range(2):  # a parameter without gradient would stop the second pass
        model.zero_grad()
        torch.stack(list(model(images, targets).values())).sum().backward()
        norms.append(sum(float(p.grad.norm()) for p in task.model.parameters() if p.grad is not None))
    return {"numbers": numbers, "norm": norms[0]}


def test_two_processes_measure_as_one_and_train_with_an_empty_batch(tmp_path: Path, encoder: Path) -> None:
    data = make_coco(tmp_path, 2, 5)
    both = run_two_ranks(in_one_rank, str(data), str(encoder))
    alone = in_one_rank(str(data), str(encoder))
    assert both[0]["numbers"].keys() == alone["numbers"].keys()
    for result in both:
        assert result["numbers"] == pytest.approx(alone["numbers"], abs=1e-6)
    assert both[0]["norm"] == pytest.approx(both[1]["norm"]) and both[0]["norm"] > 0


FOLDER = Path(__file__).parents[3] / "recipes" / "finetune"


@pytest.mark.parametrize("name", ["detect_scenes", "mask_scenes", "vitdet_vitb_coco"])
def test_recipes_parse_and_say_what_they_were_run_on(name: str) -> None:
    read_task_recipe("detection", FOLDER / f"{name}.yaml", [], {"encoder.name": "vit_tiny_patch16_224"})
    header = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines()[:12] if line.startswith("#")]
    assert any(f"recipes/finetune/{name}.yaml" in line for line in header)
    assert any(line.startswith("# hardware") for line in header)


def test_vitdet_has_the_published_numbers() -> None:
    recipe = read_task_recipe("detection", FOLDER / "vitdet_vitb_coco.yaml", [], {})
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.lr_per, recipe.run.batch_size, recipe.run.length) == (1e-4, 64, 64, "100 epochs")
    assert (optimizer.weight_decay, optimizer.layer_decay, recipe.encoder.drop_path) == (0.1, 0.7, 0.1)
    assert (recipe.model.size, recipe.augment.scale, recipe.model.rcnn.box_convs) == (1024, [0.1, 2.0], 4)
    assert recipe.model.window == 14
