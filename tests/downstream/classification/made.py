"""Class folders of coloured pictures, and recipes that train on them in seconds."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from hybrid_ssl.downstream.classification import ClassificationRecipe

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 40, 30)}
VIT = "vit_tiny_patch16_224"


def write_classes(root: Path, splits: dict[str, int], colours: dict[str, tuple[int, ...]] = COLOURS) -> Path:
    """`splits[name]` pictures of each class in root/name/CLASS, no two alike."""
    rng = Random(0)
    for split, count in splits.items():
        for name, colour in colours.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture = Image.new("RGB", (20 + i % 3, 18), tuple(max(0, c - rng.randrange(20)) for c in colour))
                picture.putpixel((i % 20, 3), (255, 255, 255))
                picture.save(root / split / name / f"{i:02d}.png")
    return root


def small_recipe(source: Path | str, name: Path | str, **sections: Any) -> ClassificationRecipe:
    data: dict[str, Any] = {
        "encoder": {"name": str(name), "drop_path": 0.0},
        "data": {"source": str(source), "size": 16, "crop": 1.0},
        "run": {"length": "4 steps", "batch_size": 4, "workers": 0},
        "export": {"verify": False},
    }
    for key, section in sections.items():
        data[key] = data.get(key, {}) | section if isinstance(section, dict) else section
    return ClassificationRecipe.model_validate(data)
