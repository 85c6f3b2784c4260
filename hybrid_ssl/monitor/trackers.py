"""Experiment trackers by name, through Accelerate's adapters.

Accelerate only warns when a tracker's package is missing and then logs nothing; here that is an error before the run
starts. Credentials come from each package's own login or environment, never from the recipe.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .redact import flatten

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
_PROJECT = "hybrid_ssl"


def check_trackers(names: Iterable[str]) -> None:
    """Refuse unknown trackers and those whose package is not installed, all in one `ValueError`."""
    problems = []
    for name in names:
        if name not in PACKAGES:
            problems.append(f"run.trackers has {name!r}; allowed are {', '.join(PACKAGES)}")
        elif importlib.util.find_spec(PACKAGES[name]) is None:
            problems.append(
                f"run.trackers has {name!r}, but {PACKAGES[name]} is not installed: "
                f"pip install {PACKAGES[name]}, or leave it out"
            )
    if problems:
        raise ValueError("; ".join(problems))


def open_trackers(names: Iterable[str], folder: Path, config: Mapping[str, Any], start: int = 0) -> list[Any]:
    """Started trackers, each with `log(values, step=)` and `finish()`. Call on the main process only.

    Args:
        folder: the run folder; its name is the run's name.
        config: the resolved recipe, stored flat with credentials replaced.
        start: steps done before; TensorBoard hides what was logged after them.
    """
    names = list(names)
    check_trackers(names)
    flat = flatten(config)
    opened = []
    for name in names:
        tracker = _build(name, folder, start)
        tracker.start()
        if name == "tensorboard":  # its hyper-parameters would open a second run folder; the text tab does not
            rows = "\n".join(f"| {key} | {value} |" for key, value in flat.items())
            tracker.tracker.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)
        else:
            tracker.store_init_configuration(flat)
        opened.append(tracker)
    return opened


def _build(name: str, folder: Path, start: int) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", str(folder), purge_step=start + 1 if start else None)
    if name == "wandb":
        return tracking.WandBTracker(_PROJECT, name=folder.name, dir=str(folder))
    if name == "trackio":
        return tracking.TrackioTracker(_PROJECT, name=folder.name)
    return tracking.MLflowTracker(_PROJECT, run_name=folder.name)
