"""The task counts exactly on any number of processes, its rates reach the optimizer, and its classifier leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from hybrid_ssl.downstream import batches
from hybrid_ssl.downstream.classification import ClassificationTask
from hybrid_ssl.downstream.fit import build_groups
from hybrid_ssl.downstream.task import Batch
from hybrid_ssl.encoder.base import layer_ids
from hybrid_ssl.optim import build_optimizer, lr_at, peak_lr, set_step
from hybrid_ssl.plan import Progress
from tests.downstream.classification.made import COLOURS, VIT, small_recipe, write_classes
from tests.ranks import run_two_ranks

WORDS = ["one", "two", "three", "four", "five", "six", "seven"]


class Guess(nn.Module):
    """Logits from the first pixels: an untrained network would call everything one class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 3, : len(WORDS)].float() + images[:, 1, 4, : len(WORDS)].float()


def noisy_classes(root: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for c, name in enumerate(WORDS):
            (root / split / name).mkdir(parents=True)
            for i in range(3 + c):
                pixels = torch.randint(0, 256, (16, 16, 3), generator=rng).byte()
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i}.png")
    return root


def measured(root: str, rank: int = 0, world: int = 1) -> tuple[dict[str, float], list[list[int]]]:
    task = ClassificationTask(small_recipe(root, VIT, encoder={"random": True}))
    counter = batches.Counter("test", task.test, 0.5, print)
    place: dict[str, Any] = {"rank": rank, "world": world, "device": torch.device("cpu")}
    parts = batches.test_batches(task, size=4, workers=0, counter=counter, **place)
    numbers = task.evaluate(Guess().eval(), parts, Accelerator(cpu=True))
    assert task.confusion is not None
    return numbers, task.confusion.tolist()


def measured_here(root: str) -> Any:
    import os

    import torch.distributed as dist

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }  # Accelerate looks, and finds the group that is there
    return measured(root, dist.get_rank(), 2)


def test_accuracies_are_counted_by_hand_and_equal_on_two_processes(tmp_path: Path) -> None:
    root = noisy_classes(tmp_path)
    numbers, confusion = measured(str(root))
    task = ClassificationTask(small_recipe(root, VIT, encoder={"random": True}))
    right: dict[str, list[bool]] = {}
    near = []
    for i in range(len(task.test)):
        image, label = task.test.read(i, None)
        order = Guess()(image[None])[0].argsort(descending=True, stable=True).tolist()
        right.setdefault(task.classes[label], []).append(order[0] == label)
        near.append(label in order[:5])
    hits = [hit for part in right.values() for hit in part]
    assert 0 < sum(hits) < len(hits) == 42
    assert numbers["top1"] == pytest.approx(sum(hits) / 42) and numbers["top5"] == pytest.approx(sum(near) / 42)
    shares = {name: sum(part) / len(part) for name, part in right.items()}
    assert {name: numbers[f"class/{name}"] for name in shares} == pytest.approx(shares)
    assert numbers["mean_class"] == pytest.approx(sum(shares.values()) / 7)
    assert sum(map(sum, confusion)) == 42
    both = run_two_ranks(measured_here, str(root))
    assert both == [(numbers, confusion)] * 2


def scales(family: str, name: str, depths: list[int]) -> int:
    """Layer of a parameter, of 0 .. depth + 1: MAE's numbering for the ViT, SimMIM's for the Swin."""
    parts = name.split(".")
    if name.startswith(("patch_embed", "cls_token", "pos_embed")):
        return 0
    if family == "vit":
        return int(parts[1]) + 1 if parts[0] == "blocks" else depths[0] + 1
    if parts[0] != "layers":
        return sum(depths) + 1
    stage = int(parts[1])
    return sum(depths[:stage]) + (0 if parts[2] == "downsample" else int(parts[3]) + 1)


@pytest.mark.parametrize(("family", "depths"), [("vit", [2]), ("swin", [1, 1])])
def test_learning_rate_of_each_parameter_is_the_layers_share(
    encoders: dict[str, Path], tmp_path: Path, family: str, depths: list[int]
) -> None:
    optimizer_settings = {"lr": 1e-3, "lr_per": None, "warmup": "2 steps", "layer_decay": 0.6, "weight_decay": 0.05}
    recipe = small_recipe(
        write_classes(tmp_path, {"train": 4, "val": 1}), encoders[family], optimizer=optimizer_settings
    )
    task = ClassificationTask(recipe)
    groups = build_groups(recipe, task.model)
    optimizer = build_optimizer(recipe.optimizer, groups)
    peak, _ = peak_lr(recipe.optimizer, 4)
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    last = sum(depths) + 1
    for step in range(4):
        now = Progress(step, 4, 3)
        set_step(recipe.optimizer, optimizer, peak, now)
        found = {name: g["lr"] for g in optimizer.param_groups for name in g["names"]}
        assert found.keys() == trained.keys()
        base = lr_at(recipe.optimizer, peak, now)
        assert found == pytest.approx(
            {n: base * 0.6 ** (last - scales(family, n.removeprefix("encoder."), depths)) for n in found}
        )
    assert layer_ids(task.model.encoder)[1] == last and base > 0


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_every_parameter_learns(encoders: dict[str, Path], tmp_path: Path, family: str) -> None:
    pool = {"head": {"pool": "avg", "std": 0.01}} if family == "vit" else {"head": {"std": 0.01}}
    task = ClassificationTask(small_recipe(write_classes(tmp_path, {"train": 4, "val": 1}), encoders[family], **pool))
    images, targets = task.collate([task.train.read(i, Random(i)) for i in range(8)])
    task.model.train()(*task.mix(images, targets, Random(0)))["loss"].backward()
    assert not [name for name, p in task.model.named_parameters() if p.grad is None], "DDP would wait for these"


def test_a_frozen_encoder_leaves_the_head_to_learn(encoders: dict[str, Path], tmp_path: Path) -> None:
    root = write_classes(tmp_path, {"train": 4, "val": 1})
    task = ClassificationTask(small_recipe(root, encoders["vit"], encoder={"frozen": True}))
    trained = [name for name, p in task.model.named_parameters() if p.requires_grad]
    assert trained == ["encoder.head.weight", "encoder.head.bias"]


@pytest.fixture(scope="module", params=["vit", "swin"])
def exported(
    request: pytest.FixtureRequest, encoders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ClassificationTask, Path]]:
    root = write_classes(tmp_path_factory.mktemp("data"), {"train": 4, "val": 1})
    recipe = small_recipe(root, encoders[request.param], data={"crop": 0.8}, head={"std": 1.0})
    task = ClassificationTask(recipe)
    out = tmp_path_factory.mktemp("out")
    line = task.export(task.model.eval(), out, {"top1": 0.5})
    assert str(out / "classifier") in line
    yield task, out / "classifier"


@torch.no_grad()
def test_exported_classifier_is_timms(exported: tuple[ClassificationTask, Path]) -> None:
    task, folder = exported
    images = torch.randn(2, 3, 16, 16)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(other(images), task.model.encoder(images))
    assert other.pretrained_cfg["label_names"] == sorted(COLOURS) and other.pretrained_cfg["crop_pct"] == 0.8
    again = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    assert again(images).shape[1] == task.model.encoder.num_features, "its encoder can be taken further"
    card = (folder / "README.md").read_text()
    assert "AutoModelForImageClassification" in card and "classifier (3 classes)" in card and "0.5000" in card
    assert str(folder) not in card + (folder / "config.json").read_text()


@torch.no_grad()
def test_exported_classifier_is_transformers(exported: tuple[ClassificationTask, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    task, folder = exported
    other, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(other.eval()(pixel_values=images).logits, task.model.encoder(images))
    assert other.config.id2label == dict(enumerate(sorted(COLOURS)))
    assert "private" not in json.dumps(other.config.to_dict())


def test_picture_is_drawn_with_and_without_confusion(encoders: dict[str, Path], tmp_path: Path) -> None:
    task = ClassificationTask(small_recipe(write_classes(tmp_path, {"train": 2, "val": 4}), encoders["vit"]))
    model = task.model.eval()
    task.draw(model, tmp_path / "a.png")
    batch = Batch(*task.collate([task.test.read(i, None) for i in range(12)]))
    task.evaluate(model, [batch], Accelerator(cpu=True))
    task.draw(model, tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as alone, Image.open(tmp_path / "b.png") as both:
        assert both.width > alone.width and alone.getextrema() != ((255, 255),) * 3
