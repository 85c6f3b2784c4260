"""Fine-tuned models as folders: `model.safetensors` and `config.json`, from which the whole model is built again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .. import __version__
from ..checkpoint import separate
from ..hub.folder import CONFIG, WEIGHTS
from ..storage import StorageError, publish
from . import KINDS
from .task import Task
from .tasks import restore

KIND = "hybrid_ssl_task"


def save_model(folder: Path, task: Task, model: nn.Module) -> None:
    """Write a fine-tuned model; an earlier one in `folder` is replaced once this one is complete.

    Raises:
        StorageError: the disk refuses; `folder` is as it was.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    config = {KIND: task.kind, "hybrid_ssl": __version__, "model": task.config()}
    with publish(folder) as path:
        try:
            save_file(separate(tensors), path / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise StorageError(f"cannot write {folder}: {error}") from error
        (path / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load_model(place: str | Path) -> nn.Module:
    """A fine-tuned model in eval mode: a `task.Fitted`, with `predict` and `draw`.

    Args:
        place: a folder that `save_model` wrote, or the folder of a fine-tuning run.

    Raises:
        ValueError: there is no such model, or weights and configuration disagree.
    """
    folder = Path(place).expanduser()
    folder = folder if (folder / CONFIG).is_file() else folder / "model"
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = config[KIND]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{place} holds no fine-tuned model ({CONFIG} with {KIND}, and {WEIGHTS}): give the folder of a "
            f"fine-tuning run, or its `model` folder ({type(error).__name__}: {error})"
        ) from error
    if kind not in KINDS:
        raise ValueError(f"{folder}: {KIND} is {kind!r}, known are {', '.join(KINDS)}")
    model = restore(kind, config["model"])
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights and configuration disagree: {error}") from error
    return model.eval()
