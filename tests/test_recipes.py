"""Every recipe parses, says what it was run on, and carries the paper's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_ssl.config import build_recipe, dump_recipe, parse_yaml, read_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

PUBLISHED = {  # learning rate of a step, images in it, length: as the papers and releases print them
    "mae_vitb": (2.4e-3, 4096, "1600 epochs"),
    "mae_vitl": (2.4e-3, 4096, "1600 epochs"),
    "simmim_vitb": (4e-4, 2048, "800 epochs"),
    "simmim_swinb": (8e-4, 2048, "100 epochs"),
    "mocov3_vits": (2.4e-3, 4096, "300 epochs"),
    "mocov3_vitb": (2.4e-3, 4096, "300 epochs"),
    "dino_vits": (2e-3, 1024, "800 epochs"),
    "dino_vitb": (3e-3, 1024, "400 epochs"),
    "ibot_vits": (2e-3, 1024, "800 epochs"),
    "ibot_vitb": (3e-3, 1024, "400 epochs"),
    "ibot_swint": (2e-3, 1024, "300 epochs"),
}


def test_the_promised_recipes_are_there() -> None:
    hybrids = {"mae_mocov3_vitb", "mae_dino_vitb", "simmim_mocov3_swinb"}
    assert PUBLISHED.keys() | hybrids | {"quickstart", "fashion_mnist"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_reads_back_the_same(path: Path) -> None:
    recipe = read_recipe(path)
    assert build_recipe(parse_yaml(dump_recipe(recipe), where=path.stem)) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_has_the_command_and_the_hardware(path: Path) -> None:
    header = [line for line in path.read_text().splitlines()[:20] if line.startswith("#")]
    assert any(f"recipes/{path.name}" in line for line in header), "no command that can be copied"
    assert any(line.startswith("# hardware") for line in header), "run on what? or 'not yet run'"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_view_and_mask_has_a_user(path: Path) -> None:
    recipe = read_recipe(path)
    values = [value for settings in recipe.objectives.values() for value in vars(settings).values()]
    words = {value for value in values if isinstance(value, str)}
    assert recipe.masks.keys() <= words and recipe.views.keys() <= words


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rate_batch_and_length_are_the_published_ones(name: str) -> None:
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    lr, batch, length = PUBLISHED[name]
    assert recipe.optimizer.lr_per is not None
    assert recipe.optimizer.lr * recipe.run.batch_size / recipe.optimizer.lr_per == pytest.approx(lr)
    assert (recipe.run.batch_size, recipe.run.length) == (batch, length)
    assert recipe.run.micro_batch is not None and batch % recipe.run.micro_batch == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_moco_v3_alone_moves_its_teacher_with_the_next_momentum(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.teacher.offset == int("moco_v3" in recipe.used_names.values())
