"""Small segmentation data: images whose brightness tells the class, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hybrid_ssl.downstream.segmentation import SegmentationRecipe

SIDE = 16


def scene(seed: int, classes: int = 3, height: int = SIDE, width: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A gray image [H, W] and its class numbers [H, W]: halves of two classes, each with its own brightness."""
    rng = np.random.default_rng(seed)
    first, second = rng.permutation(classes)[:2]
    mask = np.full((height, width), first, dtype=np.uint8)
    mask[:, width // 2 :] = second
    noise = rng.integers(0, 30, mask.shape)
    return (mask * (200 // (classes - 1)) + noise).astype(np.uint8), mask


def write(image: Path, mask: Path, seed: int, ids: np.ndarray | None = None, **scene_args: Any) -> None:
    """One pair of files; `ids` are those of the classes."""
    pixels, numbers = scene(seed, **scene_args)
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    Image.fromarray(numbers if ids is None else ids[numbers]).save(mask)


def make_folders(root: Path, train: int = 16, test: int = 8, **scene_args: Any) -> Path:
    for split, count in (("train", train), ("val", test)):
        for i in range(count):
            seed = i + 1000 * (split == "val")
            write(root / split / f"{i}.png", root / "masks" / split / f"{i}.png", seed, **scene_args)
    return root


def make_recipe(data: Path | str, encoder: Path | str, /, **sections: Any) -> SegmentationRecipe:
    """A recipe of the smallest size; `sections` are laid over it. Its seed is not the one that tiny encoders have."""
    raw: dict[str, Any] = {
        "run": {"length": "10 steps", "batch_size": 4, "workers": 0, "threads": 1, "test_batch": 4, "seed": 5},
        "encoder": {"name": str(encoder), "drop_path": 0.0},
        "data": {"source": str(data), "channels": 1},
        "model": {"head": "upernet", "channels": 16, "auxiliary_channels": 16, "dropout": 0.0},
        "augment": {"size": SIDE, "cat_max_ratio": 1.0, "jitter": None},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return SegmentationRecipe.model_validate(raw)
