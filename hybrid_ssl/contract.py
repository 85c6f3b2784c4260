"""What a resumed run may change, and what it may not; and whether a folder can take a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Recipe, build_recipe
from .reading import RecipeError

FREE = {
    "run.out", "run.workers", "run.threads", "run.micro_batch", "run.checkpoint_every", "run.keep", "run.trackers",
    "run.gradient_checkpointing", "run.compile", "data.source", "data.probe", "data.max_broken", "monitor", "export",
    "hub", "run.test_batch", "run.evaluate_every", "run.max_broken",
}  # fmt: skip
"""Keys that change how a run is carried out, not what it computes. The data may have moved: its fingerprint decides.
The micro-batch may fit another machine: where it matters, the number of micro-batches in a step decides."""


def check_folder(out: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None for a new run; ValueError when the folder does not fit."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"run.out {str(out)!r} is a file: choose a folder")
    used = out.is_dir() and any(path.name != ".lock" for path in out.iterdir())
    found = checkpoint.latest(out / "checkpoints")
    if resume and found is None:
        raise ValueError(f"--resume: {out} holds no checkpoint; start without it, or set run.out to the run's folder")
    if used and not resume:
        what = f"a run at {found.name}" if found else "other files"
        raise ValueError(
            f"run.out {str(out)!r} is in use, it holds {what}: add --resume to continue, or choose another"
        )
    return found


def check_resume(
    before: Mapping[str, Any], recipe: Recipe, facts_before: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """ValueError with every difference to the checkpoint: of the recipe, and of facts that no recipe holds."""
    try:
        before = build_recipe(before).model_dump(mode="json")  # keys that are newer than the checkpoint: the defaults
    except RecipeError:
        pass  # written by another version: the differences say what
    check_same(before, recipe.model_dump(mode="json"), facts_before, facts)


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], facts_before: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """The same for recipes of any kind, as plain data with every default."""
    differences = _differences(before, now)
    problems = [f"{path}: was {old!r}, is {new!r}" for path, old, new in differences if not _is_free(path)]
    problems += [
        f"{name}: was {facts_before.get(name)!r}, is {facts.get(name)!r}"
        for name in dict.fromkeys([*facts_before, *facts])
        if facts_before.get(name) != facts.get(name)
    ]
    if problems:
        raise ValueError(
            "--resume: what decides the run has changed; put it back, or start a new run in another run.out:\n  "
            + "\n  ".join(problems)
        )


def _is_free(path: str) -> bool:
    return any(path == key or path.startswith(key + ".") for key in FREE)


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = list(dict.fromkeys([*before, *now]))
        inner = [_differences(before.get(key), now.get(key), f"{path}.{key}" if path else key) for key in keys]
        return [difference for part in inner for difference in part]
    return [] if before == now else [(path, before, now)]
