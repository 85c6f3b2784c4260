"""A stored fine-tuned model on a user's images: annotated pictures, and what was found as files others can read.

    pictures/NAME.png    each image with its label, boxes, masks or classes
    predictions.jsonl    classification: label, probability and the next best; segmentation: each class' share
    predictions.json     detection: COCO's form (images, categories, annotations), with scores; masks as run lengths
    maps/NAME.png        segmentation: the number of the class of each pixel
    summary.json         the model's classes, how many images, and which could not be read

Images are read one at a time, as the model saw them in training (channels, value range), in their own size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..data.decode import Decoder
from ..data.files import EXTENSIONS, Files
from ..data.sources import Images, open_named, printable
from .stored import load_model


def predict(
    model: str | Path,
    images: Sequence[str],
    out: Path,
    *,
    device: str = "auto",
    split: str = "train",
    score: float | None = None,
) -> str:
    """Run a model over images.

    Args:
        model: a fine-tuning run's folder, or its stored model.
        images: image files, or one folder, list or data set in any form that pretraining takes.
        out: a new folder.
        device: `auto`: a GPU if there is one.
        split: of a data set, or of a folder with train, val, test.
        score: of a detector, the least one of what is drawn, 0..1; the files have everything.

    Returns:
        a sentence for the user.

    Raises:
        ValueError: no model, no images, none of them can be read, `out` holds files, or a score for no detector.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: choose a new folder")
    source = _open(images, split)
    net: Any = load_model(model)
    if score is not None:
        if not hasattr(net, "drawn") or not 0 <= score <= 1:
            raise ValueError(f"--score {score:g}: give a number in 0..1, and only for a model of detection")
        net.drawn = score
    place = _device(device)
    net.to(place)
    writer = Writer(out, net.classes)
    broken: dict[str, str] = {}
    for i, name in tqdm(_named(source), total=len(source), disable=not sys.stderr.isatty(), unit="images"):
        try:
            image = _decoder(net)(source.read(i)[0])
            found = net.predict(image)
        except ValueError as problem:
            broken[printable(source.name(i))] = str(problem)
            continue
        writer.add(name, image, found, net.draw(image, found))
    if not writer.count:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(broken.items())[:3])
        raise ValueError(f"none of the {len(source)} images can be read: {told}")
    writer.finish(broken)
    lines = [f"left out, {name}: {reason}" for name, reason in broken.items()]
    return "\n".join(
        [*lines, f"{writer.count} images, {len(broken)} broken ones; pictures and predictions are in {out}"]
    )


class Writer:
    """Files of predictions, made as they come."""

    def __init__(self, out: Path, classes: Sequence[str]) -> None:
        self.out, self.classes, self.count = out, list(classes), 0
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []

    def add(self, name: str, image: Tensor, found: dict[str, Any], drawn: Tensor) -> None:
        """One image with what a model's `predict` found on it."""
        self.count += 1
        self._picture("pictures", name, drawn.permute(1, 2, 0).cpu().numpy())
        if "boxes" in found:
            self._objects(name, image, found)
            return
        line = {key: value for key, value in found.items() if not isinstance(value, Tensor)}
        if isinstance(found.get("labels"), Tensor):  # a class for each pixel
            numbers = found["labels"].cpu().numpy()
            small = len(self.classes) <= 256
            line["map"] = self._picture("maps", name, numbers.astype(np.uint8 if small else np.uint16))
        with (self.out / "predictions.jsonl").open("a") as file:
            file.write(json.dumps({"image": printable(name)} | line) + "\n")

    def finish(self, broken: dict[str, str]) -> None:
        """What is known only at the end."""
        if self.images:
            categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)]
            content = {"images": self.images, "categories": categories, "annotations": self.objects}
            (self.out / "predictions.json").write_text(json.dumps(content) + "\n")
        summary = {"classes": self.classes, "images": self.count, "broken": broken}
        (self.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    def _objects(self, name: str, image: Tensor, found: dict[str, Any]) -> None:
        """Boxes as x, y, width, height; categories count from 1, as COCO's do."""
        height, width = image.shape[-2:]
        number = len(self.images) + 1
        self.images.append({"id": number, "file_name": printable(name), "width": width, "height": height})
        masks: list[Any] = [None] * len(found["boxes"])
        if "masks" in found:
            from .detection.rle import encode  # needs pycocotools

            masks = encode(found["masks"].to(torch.uint8).cpu().numpy())
        columns = (found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), masks)
        for (left, top, right, bottom), label, score, mask in zip(*columns, strict=True):
            box = [round(value, 2) for value in (left, top, right - left, bottom - top)]
            entry: dict[str, Any] = {"id": len(self.objects) + 1, "image_id": number, "category_id": label + 1}
            entry |= {"bbox": box, "area": round(box[2] * box[3], 2), "iscrowd": 0, "score": round(score, 5)}
            if mask is not None:
                entry["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
            self.objects.append(entry)

    def _picture(self, folder: str, name: str, pixels: np.ndarray) -> str:
        """Write a PNG; its path inside the output."""
        path = PurePath(folder) / f"{name}.png"
        (self.out / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(self.out / path)
        return printable(str(path))


def _open(images: Sequence[str], split: str) -> Images:
    paths = [Path(name).expanduser() for name in images]
    if not all(path.is_file() and path.suffix.lower() in EXTENSIONS for path in paths):
        return open_named(list(images), split=split)
    names = [path.name for path in paths]
    keys = names if len(set(names)) == len(names) else [f"{i:03d}_{name}" for i, name in enumerate(names)]
    return _Chosen([str(path) for path in paths], keys, None, f"{len(paths)} images")


class _Chosen(Files):
    """Image files that were named one by one."""

    def __init__(self, paths: Sequence[str], keys: Sequence[str], labels: Sequence[Any] | None, sentence: str) -> None:
        super().__init__(paths, [Path(path).name for path in paths], labels, sentence)
        self._shown = list(keys)

    def key(self, i: int) -> str:
        return self._shown[i]


def _named(source: Images) -> Iterator[tuple[int, str]]:
    """Number of each image, and what its files are called: its place in its folder, or the number."""
    for i in range(len(source)):
        try:
            name = PurePath(source.key(i))
        except ValueError:  # a table
            yield i, f"{i:06d}"
            continue
        inside = not name.is_absolute() and ".." not in name.parts
        yield i, str(name) if inside else f"{i:06d}_{name.name}"


def _decoder(model: nn.Module) -> Decoder:
    """As in training: the channels that the first layer reads, and the range of values that was given."""
    encoder: Any = model.encoder
    channels = next(module.in_channels for module in encoder.modules() if isinstance(module, nn.Conv2d))
    return Decoder(channels, getattr(model, "value_range", None))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as problem:
        reason = (str(problem).splitlines() or [repr(problem)])[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from problem
