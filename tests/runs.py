"""Whole runs at the smallest size: a recipe as plain data, the command line in this process, and what a run left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from hybrid_ssl.checkpoint import checkpoints
from hybrid_ssl.cli import main
from hybrid_ssl.config import Recipe, build_recipe
from hybrid_ssl.monitor.log import read_metrics
from hybrid_ssl.objectives.mae import MAE, MAESettings
from hybrid_ssl.plan import Batch, Forward, Progress, Tokens

MAE_ENTRY = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
MOCO_ENTRY = {"hidden": 32, "dim": 16}
HEAD = {"out_dim": 24, "hidden": 32, "bottleneck": 16, "teacher_temperature": 0.04}
PATCH_HEAD = HEAD | {"patch_temperature": 0.04}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mae+moco_v3": {"mae": MAE_ENTRY, "moco_v3": MOCO_ENTRY},
    "dino": {"dino": HEAD},
    "ibot": {"ibot": PATCH_HEAD},
    "dino+ibot": {"dino": HEAD | {"mask": "block"}, "ibot": PATCH_HEAD},
}
VIT = {"name": "vit_tiny_patch16_224", "args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2, "window_size": 4},
}


def recipe_data(
    out: Path | str, objectives: str | Mapping[str, Any] = "mae+moco_v3", **sections: Any
) -> dict[str, Any]:
    """64 small images, 8 of them a step; `sections` are laid over the recipe's, key by key."""
    entries = OBJECTIVES[objectives] if isinstance(objectives, str) else objectives
    data: dict[str, Any] = {
        "run": {"length": "10 steps", "batch_size": 8, "out": str(out), "workers": 0, "threads": 1},
        "encoder": VIT | {"drop_path": 0.2},
        "data": {"source": "embedded:fashion_mnist", "channels": 1, "mean": [0.3], "std": [0.3], "limit": 64},
        "views": {
            "plain": {"size": 16},
            "global": {"size": 16, "crops": 2, "jitter": {}, "blur": [0.5, 0.1]},
            "local": {"size": 8, "crops": 2, "scale": [0.1, 0.4]},
        },
        "masks": {
            "random": {"kind": "random", "view": "plain", "ratio": 0.75},
            "block": {"kind": "block", "view": "global", "min_tokens": 2, "p": 0.5},
        },
        "objectives": dict(entries),
        "teacher": {"momentum": {"start": 0.9, "end": 1.0, "shape": "cosine"}},
        "optimizer": {"lr": 1e-3, "lr_per": None, "warmup": "2 steps", "clip": {"norm": 1.0}},
        "monitor": {"log_every": 1, "probe_every": None},
        "export": {"verify": False},
    }
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section
    return data


def tiny_recipe(objectives: str | Mapping[str, Any] = "mae+moco_v3", **sections: Any) -> Recipe:
    return build_recipe(recipe_data("unused", objectives, **sections))


def write_recipe(folder: Path, data: Mapping[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dict(data)))
    return path


def pretrain(*words: str | Path) -> int:
    """`hybrid-ssl pretrain WORDS` in this process; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several runs
    return main(["pretrain", *map(str, words)])


def losses(out: Path) -> dict[int, dict[str, float]]:
    """Step -> every number of its line that is no speed."""
    speed = {"images_per_second", "data_wait", "step"}
    return {
        row["step"]: {k: v for k, v in row.items() if k not in speed} for row in read_metrics(out / "metrics.jsonl")
    }


def newest_tensors(out: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    newest = checkpoints(out / "checkpoints")[0]
    return {f"{file.stem}.{name}": t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class PoisonedSettings(MAESettings):
    poisoned: list[int]


class Poisoned(MAE):
    """MAE whose loss is NaN in some steps."""

    Config = PoisonedSettings

    def __init__(self, cfg: PoisonedSettings, encoder: Any) -> None:
        super().__init__(cfg, encoder)
        self.poisoned = cfg.poisoned

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        terms = super().loss(tokens, batch, now)
        return terms | {"loss": terms["loss"] * float("nan")} if now.step in self.poisoned else terms
