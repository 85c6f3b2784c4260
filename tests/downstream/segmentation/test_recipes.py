"""The recipes of segmentation parse, carry the papers' numbers, and say what they were run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_ssl.downstream.tasks import read_task_recipe
from hybrid_ssl.optim import peak_lr

FOLDER = Path(__file__).parents[3] / "recipes" / "finetune"
NAMES = ["upernet_vitb_ade20k", "upernet_swint_ade20k", "segment_scenes"]
PUBLISHED = {  # learning rate, weight decay, layer decay, stochastic depth, how it is tested
    "upernet_vitb_ade20k": (1e-4, 0.05, 0.65, 0.1, "slide"),
    "upernet_swint_ade20k": (6e-5, 0.01, None, 0.3, "whole"),
}


@pytest.mark.parametrize("name", NAMES)
def test_recipes_parse_and_say_what_they_were_run_on(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    read_task_recipe("segmentation", path, [], {"encoder.name": "vit_tiny_patch16_224"})
    header = [line for line in path.read_text().splitlines()[:20] if line.startswith("#")]
    assert any(f"recipes/finetune/{name}.yaml" in line for line in header)
    assert any(line.startswith("# hardware") for line in header)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ade20k_recipes_have_the_published_numbers(name: str) -> None:
    recipe = read_task_recipe("segmentation", FOLDER / f"{name}.yaml", [], {})
    optimizer = recipe.optimizer
    found = (peak_lr(optimizer, 16)[0], optimizer.weight_decay, optimizer.layer_decay, recipe.encoder.drop_path)
    assert (*found, recipe.test.mode) == PUBLISHED[name]
    assert (recipe.run.length, recipe.run.batch_size, recipe.augment.size) == ("160000 steps", 16, 512)
    assert (recipe.model.channels, recipe.model.auxiliary, recipe.model.norm) == (512, 0.4, "batch")
