"""Images with their objects as samples, and where they lie in the usual folder layouts."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.decode import Decoder
from .augment import Objects, augment, tidy
from .coco import Coco
from .settings import DetectionAugment, DetectionData

_SPLITS = {
    "train": ("train2017", "train2014", "train", "training"),
    "val": ("val2017", "val2014", "val", "valid", "validation", "minival", "test"),
}
_NAMES = ("annotations/instances_{}.json", "annotations/{}.json", "{}/_annotations.coco.json", "{}.json")


class Place(NamedTuple):
    """One split: its annotations, and the folder that its file names start from."""

    annotations: Path
    images: Path


class CocoSamples:
    """Samples (image uint8 [C, H, W], objects).

    Args:
        coco: the annotations.
        folder: where its file names start from.
        augmentation: what `read` with a generator does.
        size: side of the square that training images fit into.
        masks: whether objects have masks.
    """

    def __init__(
        self, coco: Coco, folder: Path, decoder: Decoder, augmentation: DetectionAugment, size: int, masks: bool
    ) -> None:
        self.coco, self.folder, self.decoder = coco, folder, decoder
        self.augmentation, self.size, self.masks = augmentation, size, masks

    def __len__(self) -> int:
        return len(self.coco)

    def name(self, i: int) -> str:
        return self.coco.files[i]

    def read(self, i: int, rng: Random | None) -> tuple[Tensor, Objects]:
        """Augmented, or in full size; the measure takes truth from `coco`, so test samples come without masks."""
        image = self._image(i)
        if rng is None:
            return image, self.objects(i, masks=False)
        return augment(image, self.objects(i, masks=self.masks), self.augmentation, self.size, rng)

    def objects(self, i: int, masks: bool) -> Objects:
        """Truth of image `i`, without crowd regions."""
        numbers = self.coco.of(i)
        height, width = (int(side) for side in self.coco.sizes[i])
        covers = None
        if masks:
            covers = torch.zeros(len(numbers), height, width, dtype=torch.uint8)
            for row, number in enumerate(numbers):
                covers[row] = torch.from_numpy(self.coco.mask(i, number))
        boxes = torch.from_numpy(self.coco.boxes[numbers])
        return tidy(Objects(boxes, torch.from_numpy(self.coco.labels[numbers]), covers), (height, width))

    def _image(self, i: int) -> Tensor:
        image = self.decoder(self.folder / self.coco.files[i])
        height, width = self.coco.sizes[i]
        if image.shape[-2:] != (height, width):
            turned = " (its EXIF data may turn it)" if image.shape[-2:] == (width, height) else ""
            raise ValueError(
                f"is {image.shape[-1]} x {image.shape[-2]} pixels{turned}, its annotations are for {width} x {height}"
            )
        return image


def find_split(cfg: DetectionData, split: str) -> Place:
    """Where a split lies.

    Raises:
        ValueError: nothing is given, or nothing is found; what was looked for.
    """
    if not cfg.source:
        raise ValueError("data.source is empty: give a folder with COCO annotations, on the command line as --data")
    root = Path(cfg.source).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.source: {root} is no folder: give one with images and COCO annotations")
    given = cfg.train if split == "train" else cfg.val
    names = [given] if given else [name.format(part) for name in _NAMES for part in _SPLITS[split]]
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise ValueError(
            f"{root} has no {split} annotations: looked for {', '.join(names[:4])}...; give their file as data.{split}"
            if not given
            else f"data.{split}: {root / given} is no file"
        )
    return Place(found, root)


def find_images(cfg: DetectionData, place: Place, coco: Coco, split: str) -> Path:
    """The folder that a split's file names start from: the first of the usual ones that has one of its images.

    Raises:
        ValueError: no folder has any of the first images.
    """
    root = place.images
    given = cfg.train_images if split == "train" else cfg.val_images
    stem = place.annotations.stem.removeprefix("instances_")
    parts = [stem, *_SPLITS[split]]
    folders = [root / part for part in parts] + [root / "images" / part for part in parts]
    folders += [root / part / "images" for part in parts] + [root / "images", root, place.annotations.parent]
    candidates = [root / given] if given else folders
    some = coco.files[:: max(1, len(coco.files) // 20)]
    for folder in candidates:
        if folder.is_dir() and any((folder / name).is_file() for name in some):
            return folder
    where = f"data.{split}_images: {root / given} has" if given else f"{root} has"
    raise ValueError(
        f"{where} none of the images that {place.annotations.name} lists, e.g. {coco.files[0]}; "
        f"give their folder as data.{split}_images"
    )
