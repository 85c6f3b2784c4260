"""What a resumed run may change, and what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Recipe

FREE = {
    "run.out", "run.workers", "run.threads", "run.micro_batch", "run.checkpoint_every", "run.keep", "run.trackers",
    "run.gradient_checkpointing", "run.compile", "data.source", "data.probe", "data.max_broken", "monitor", "export",
}  # fmt: skip
"""Keys that change how a run is carried out, not what it computes. The data may have moved: its fingerprint decides."""


def check_resume(before: Mapping[str, Any], recipe: Recipe, old_data: str, new_data: str) -> None:
    """ValueError with every difference when the recipe or the data is not the one of the checkpoint."""
    now = recipe.model_dump(mode="json")
    problems = [
        f"{path}: was {old!r}, is {new!r}" for path, old, new in _differences(before, now) if not _is_free(path)
    ]
    if old_data != new_data:
        problems.append("data: other images than the run began with (added, removed or changed files)")
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
