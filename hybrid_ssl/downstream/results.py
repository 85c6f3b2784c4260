"""`results.json`: what an evaluation or a fine-tuning came to, in one form for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..storage import StorageError

RESULTS = "results.json"


class Encoded(NamedTuple):
    """Which encoder a result is of."""

    name: str
    """as people call it: the folder's own name, a Hub id or a timm name; no path"""
    architecture: str
    random: bool
    parameters: int
    public: bool = False
    """neither random nor from a folder: published weights, by their name or as a file"""


def encoded(name: str, model: Any, random: bool) -> Encoded:
    """Describe an encoder; `name` as the user gave it, of which a path keeps its last two parts."""
    path = Path(name)
    shown = "/".join(path.parts[-2:]) if path.exists() else name
    size = sum(parameter.numel() for parameter in model.parameters())
    public = not random and not path.is_dir()
    return Encoded(shown.lstrip("/"), model.pretrained_cfg["architecture"], random, size, public)


def write_results(
    folder: Path,
    *,
    task: str,
    metric: str,
    metrics: Mapping[str, float],
    encoder: Encoded,
    data: Mapping[str, Any],
    seed: int,
    seconds: float,
    hardware: str,
    **more: Any,
) -> Path:
    """Write `folder/results.json`, whole or not at all.

    Args:
        task: `classification`, `detection`, `segmentation`, or an evaluation's protocol.
        metric: the key of `metrics` that stands for all; larger is better.
        data: facts about the data, without paths.
        seconds: of training or fitting.
        more: anything else that is JSON, e.g. `history`, `steps`, `settings`.

    Raises:
        StorageError: the disk refuses; an earlier file is as it was.
    """
    content = {
        "task": task,
        "metric": metric,
        "value": metrics[metric],
        "metrics": dict(metrics),
        "encoder": encoder._asdict(),
        "data": dict(data),
        "seed": seed,
        "seconds": round(seconds, 1),
        "hardware": hardware,
        **more,
    }
    temporary = folder / f".{RESULTS}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        return temporary.replace(folder / RESULTS)
    except OSError as error:
        raise StorageError(f"cannot write {folder / RESULTS}: {error.strerror or error}") from error
