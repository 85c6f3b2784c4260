"""The recipes carry the papers' numbers and run; data that cannot be learned from ends in a sentence and exit code."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from hybrid_ssl.downstream.classification import ClassificationTask
from hybrid_ssl.downstream.tasks import read_task_recipe
from hybrid_ssl.optim import peak_lr
from tests.downstream.classification.made import write_classes
from tests.downstream.tiny import finetune

FOLDER = Path(__file__).parents[3] / "recipes" / "finetune"
PUBLISHED = {  # learning rate of a step, images in it, length, layer decay
    "mae_vitb_in1k": (2e-3, 1024, "100 epochs", 0.65),
    "simmim_swinb_in1k": (5e-3, 2048, "100 epochs", 0.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    recipe = read_task_recipe("classification", FOLDER / f"{name}.yaml", [], {})
    lr, batch, length, decay = PUBLISHED[name]
    assert peak_lr(recipe.optimizer, recipe.run.batch_size)[0] == pytest.approx(lr)
    assert (recipe.run.batch_size, recipe.run.length, recipe.optimizer.layer_decay) == (batch, length, decay)
    assert (recipe.mix.mixup, recipe.mix.cutmix, recipe.label_smoothing, recipe.augment.erase) == (0.8, 1.0, 0.1, 0.25)


@pytest.mark.parametrize(("name", "family"), [("mae_vitb_in1k", "vit"), ("simmim_swinb_in1k", "swin")])
def test_recipe_trains_a_tiny_encoder(name: str, family: str, encoders: dict[str, Path], tmp_path: Path) -> None:
    changes = ["data.size=16", "run.batch_size=4", "run.micro_batch=4", "run.precision=fp32"]
    given = {"encoder.name": str(encoders[family]), "data.source": str(write_classes(tmp_path, {"train": 3, "val": 1}))}
    recipe = read_task_recipe("classification", FOLDER / f"{name}.yaml", changes, given)
    task = ClassificationTask(recipe)
    images, targets = task.collate([task.train.read(i, Random(i)) for i in range(4)])
    loss = task.model.train()(*task.mix(images, targets, Random(0)))["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in task.model.parameters())


def test_header_has_the_command_and_the_hardware() -> None:
    for path in (FOLDER / f"{name}.yaml" for name in (*PUBLISHED, "classify_objects")):
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"recipes/finetune/{path.name}" in line for line in header)
        assert any(line.startswith("# hardware") for line in header)


@pytest.mark.parametrize(
    ("classes", "words", "sentence"),
    [
        ({"val": {"cat": (0, 0, 0), "dog": (9, 9, 9)}}, [], "no class of the test set is one of the training's"),
        ({}, [], "no test set"),
        ({"val": None}, ["augment.rand_augment=strong"], "is not like rand-m9-mstd0.5-inc1"),
        ({"val": None}, ["head.pool=mean"], "head.pool: should be 'avg' or 'token'"),
        ({"val": None}, ["mix.mixu=0.1"], "did you mean 'mixup'"),
        ({"val": None}, ["data.channels=5"], "has 3 channel"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(
    encoders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    classes: dict[str, dict[str, tuple[int, ...]] | None],
    words: list[str],
    sentence: str,
) -> None:
    write_classes(tmp_path / "data", {"train": 4})
    for split, colours in classes.items():
        write_classes(tmp_path / "data", {split: 2}, *([colours] if colours else []))
    small = ["data.size=16", "run.batch_size=4", "run.workers=0", "run.length=2 steps", "run.threads=1"]
    place = ["--data", tmp_path / "data", "--out", tmp_path / "out"]
    assert finetune("classification", encoders["vit"], *place, *small, *words) == 2
    told = capsys.readouterr().err
    assert sentence in told and "Traceback" not in told
    assert not (tmp_path / "out" / "model").exists()
