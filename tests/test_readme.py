"""What the README prints is true: its recipe parses, its objective runs, its commands name things that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from hybrid_ssl.config import build_recipe
from hybrid_ssl.objectives import OBJECTIVES
from hybrid_ssl.plan import Batch, EncoderSpec, Progress, Tokens
from hybrid_ssl.reading import parse_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    """The first code block in `language`."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"no {language} block in the README"
    return found[1]


def test_recipe_parses() -> None:
    recipe = build_recipe(parse_yaml(block("yaml"), where="README.md"))
    assert list(recipe.objectives) == ["mae", "dino"]


def test_own_objective_gives_a_loss_with_gradients() -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(block("python"), names)
    objective = names["Agree"](names["AgreeSettings"](name="readme:Agree"), EncoderSpec(dim=8, stride=4))
    student, teacher = (Tokens(torch.randn(6, 8), torch.randn(6, 4, 8)) for _ in range(2))
    loss = objective.loss({objective.guess: student, objective.target: teacher}, Batch({}, {}), Progress(0, 10, 5))
    loss["loss"].backward()
    assert 0 < loss["loss"].item() < 2
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_commands_name_things_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    files = set(re.findall(r"(?:recipes|tools)/\w+\.(?:yaml|py)", README)) - {"recipes/agree_vitb.yaml"}
    assert files and all((ROOT / file).is_file() for file in files)


def test_table_names_objectives_that_exist() -> None:
    named = set(re.findall(r"^\| `(\w+)` \| \[\d{4}\.\d+\]", README, re.MULTILINE))
    assert {"mae", "simmim", "moco_v3", "dino", "ibot"} <= named <= OBJECTIVES.keys()
