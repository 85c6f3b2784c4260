"""Labelled pictures that colours tell apart, and evaluations of seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hybrid_ssl.cli import main
from hybrid_ssl.downstream.evaluation.settings import EvaluateRecipe
from hybrid_ssl.reading import check

SIDE = 16
CLASSES = ("blue", "green", "red")
PROTOCOLS = ["knn", "linear", "logistic", "lowshot", "retrieval", "attentive"]
SHORT = {
    "knn": {"k": [1, 5, 500], "headline": 5},
    "linear": {
        "sweep": {"lrs": [0.01, 1.0], "blocks": [1, 4], "epochs": 6, "batch_size": 16},
        "mae": {"lrs": [10.0, 100.0], "epochs": 40, "warmup": 1, "batch_size": 48},
        "held_out": 0.25,
    },
    "logistic": {"strengths": [1e-3, 0.1], "iterations": 15, "held_out": 0.25},
    "lowshot": {"shares": [0.05, 0.3], "splits": 2},
    "retrieval": {"ks": [1, 5]},
    "attentive": {"lrs": [1e-3, 1e-2], "epochs": 6, "batch_size": 16, "head_dim": 8, "held_out": 0.25},
}


def pictures(folder: Path, train: int = 16, test: int = 8) -> Path:
    """`train/CLASS/*.png` and `test/CLASS/*.png`: noise of one colour for each class, not all of one size."""
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(reversed(CLASSES)):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 160, (SIDE, SIDE + 4 * (i % 2), 3), generator=draw)
                image[..., channel] += 60
                Image.fromarray(image.to(torch.uint8).numpy()).save(place / f"{i:02}.png")
    return folder


def recipe(encoder: Path | str, data: Path | str, out: Path | str, **sections: object) -> EvaluateRecipe:
    """Everything short; `sections` go before."""
    raw: dict[str, object] = {
        "protocols": PROTOCOLS,
        "encoder": {"name": str(encoder)},
        "data": {"source": str(data)},
        "run": {"out": str(out), "batch_size": 7, "workers": 0, "threads": 1},
        **SHORT,
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section  # type: ignore[dict-item]
    return check(EvaluateRecipe, raw)


def evaluate(*words: str | Path) -> int:
    """`hybrid-ssl evaluate WORDS`; its exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, several runs
    return main(["evaluate", *map(str, words)])
