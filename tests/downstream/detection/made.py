"""Small detection data: bright rectangles and discs on dark noise, in COCO's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hybrid_ssl.downstream.detection import DetectionRecipe

NAMES = ["square", "disc"]
SMALL: dict[str, Any] = {  # a detector of the smallest size
    "size": 32,
    "strides": [4, 8],
    "channels": 32,
    "convs": 1,
    "anchors": [[8.0], [16.0], [32.0]],
    "rcnn": {
        "rpn_sampled": 32, "candidates": [50, 50], "proposals": [20, 20], "sampled": 16, "box_dim": 32,
        "mask_convs": 1, "mask_channels": 8,
    },
}  # fmt: skip


def counts_of(mask: np.ndarray) -> list[int]:
    """Uncompressed run lengths down the columns, zeros first."""
    flat = mask.ravel(order="F").astype(np.int8)
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return [0] * int(flat[0]) + np.diff(bounds).tolist()


def scene(seed: int, side: int = 32, objects: int = 2) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """A gray image [H, W] and (label, mask) of its objects, which may lie apart or over each other."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 40, (side, side)).astype(np.uint8)
    found: list[tuple[int, np.ndarray]] = []
    y, x = np.mgrid[:side, :side]
    for _ in range(objects):
        label, size = int(rng.integers(2)), int(rng.integers(side // 4, side // 2))
        top, left = rng.integers(0, side - size, 2)
        box = (y >= top) & (y < top + size) & (x >= left) & (x < left + size)
        round_one = (y + 0.5 - top - size / 2) ** 2 + (x + 0.5 - left - size / 2) ** 2 <= size**2 / 4
        mask = box & round_one if label else box
        image[mask] = 230 if label else 120
        found = [(other, cover & ~mask) for other, cover in found] + [(label, mask)]
    return image, [(label, mask) for label, mask in found if mask.sum() > 8]


def annotation(number: int, image: int, label: int, mask: np.ndarray, **changes: Any) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    plain = {
        "id": number, "image_id": image, "category_id": 10 * (label + 1), "iscrowd": 0, "bbox": box,
        "area": int(mask.sum()), "segmentation": {"size": list(mask.shape), "counts": counts_of(mask)},
    }  # fmt: skip
    return plain | changes


def coco(images: int, first: int = 0, objects: int = 2) -> dict[str, Any]:
    """The JSON of scenes first, first + 1, ..."""
    content: dict[str, Any] = {"categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)]}
    content["images"] = [
        {"id": seed, "file_name": f"{seed}.png", "height": 32, "width": 32} for seed in range(first, first + images)
    ]
    content["annotations"] = [
        annotation(100 * seed + n + 1, seed, label, mask)
        for seed in range(first, first + images)
        for n, (label, mask) in enumerate(scene(seed, objects=objects)[1])
    ]
    return content


def make_coco(root: Path, train: int = 16, test: int = 6, objects: int = 2) -> Path:
    """A folder as `make_scenes` lays it out."""
    for split, count, first in (("train", train, 0), ("val", test, 1000)):
        content = coco(count, first, objects)
        (root / split).mkdir(parents=True)
        for entry in content["images"]:
            Image.fromarray(scene(entry["id"], objects=objects)[0]).save(root / split / entry["file_name"])
        write(root, split, content)
    return root


def write(root: Path, split: str, content: Mapping[str, Any]) -> Path:
    file = root / f"annotations/instances_{split}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def make_recipe(data: Path, encoder: Path | str, kind: str = "mask_rcnn", /, **sections: Any) -> DetectionRecipe:
    """`model` and `augment` are laid over small ones."""
    raw: dict[str, Any] = {
        "data": {"source": str(data)},
        "encoder": {"name": str(encoder), "drop_path": 0.0},
        "model": SMALL | {"kind": kind},
        "augment": {"scale": [1.0, 1.0]},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return DetectionRecipe.model_validate(raw)
