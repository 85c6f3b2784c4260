"""The fine-tuning tasks by name; their packages are imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..reading import RecipeError, check, read_mapping
from . import KINDS
from .settings import FinetuneRecipe
from .task import Task


def read_task_recipe(kind: str, path: str | Path | None, overrides: Sequence[str], given: Mapping[str, Any]) -> Any:
    """The recipe of a task.

    Args:
        kind: one of `KINDS`.
        path: a YAML file; None: the defaults.
        overrides: `key.path=value`.
        given: key.path -> value from the command line's own arguments; it goes before the file.

    Raises:
        RecipeError: with one line for every problem.
    """
    model: type[FinetuneRecipe] = _of(kind, "Recipe")
    raw = read_mapping(path, overrides, list(model.model_fields))
    for key, value in given.items():
        section, _, name = key.partition(".")
        below = raw.setdefault(section, {})
        if not isinstance(below, dict):
            raise RecipeError(f"{section} is {below!r}: it must be a mapping")
        below[name] = value
    return check(model, raw)


def build_task(recipe: FinetuneRecipe, kind: str) -> Task:
    """Data and model of a recipe; ValueError for what the user has to change."""
    task: Task = _of(kind, "Task")(recipe)
    return task


def restore(kind: str, config: Mapping[str, Any]) -> nn.Module:
    """The model of `Task.config()` with random weights; it is a `task.Fitted`."""
    model: nn.Module = import_module(f"{__package__}.{kind}").restore(dict(config))
    return model


def _of(kind: str, what: str) -> Any:
    assert kind in KINDS, kind
    return getattr(import_module(f"{__package__}.{kind}"), kind.capitalize() + what)
