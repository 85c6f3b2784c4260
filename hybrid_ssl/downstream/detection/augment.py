"""Flips and large-scale jitter of an image with its boxes and masks (arXiv 2012.07177, as ViTDet uses it).

The image is resized to fit into a square times a random factor, and a random part of the square's size is cut; what is
smaller than the square is padded later, by the model, on the right and below. Only the part that is seen is resized.
Objects with masks get the tightest box around what is left of them, others the clipped box; those of which nothing is
left are dropped. Every number is drawn from the given generator.

Shapes: image uint8 [C, H, W]; boxes float32 [n, 4] as x1, y1, x2, y2; labels int64 [n]; masks uint8 [n, H, W].
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import DetectionAugment

_SMALLEST = 1.0  # pixels of a box's side: less cannot be learned


class Objects(NamedTuple):
    """What is in an image."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def target(self) -> dict[str, Tensor]:
        """As torchvision's detectors take it."""
        both = {"boxes": self.boxes, "labels": self.labels}
        return both if self.masks is None else {**both, "masks": self.masks}


def augment(image: Tensor, objects: Objects, cfg: DetectionAugment, size: int, rng: Random) -> tuple[Tensor, Objects]:
    """A random flip and part of an image; both sides of the result are at most `size`."""
    flip = rng.random() < cfg.hflip
    scale = cfg.scale[0] + (cfg.scale[1] - cfg.scale[0]) * rng.random()
    factor = size * scale / max(image.shape[-2:])
    top, height, out_height = _part(image.shape[-2], factor, size, rng.random())
    left, width, out_width = _part(image.shape[-1], factor, size, rng.random())
    image = image[:, top : top + height, left : left + width]
    image = resize(image, (out_height, out_width))
    boxes = objects.boxes - torch.tensor([left, top, left, top])
    boxes = boxes * torch.tensor([out_width / width, out_height / height] * 2)
    masks = objects.masks
    if masks is not None:
        masks = masks[:, top : top + height, left : left + width]
        if len(masks) and masks.shape[-2:] != (out_height, out_width):
            masks = F.interpolate(masks[None], size=(out_height, out_width), mode="nearest-exact")[0]
    if flip:
        image = image.flip(-1)
        boxes = torch.stack([out_width - boxes[:, 2], boxes[:, 1], out_width - boxes[:, 0], boxes[:, 3]], dim=1)
        masks = None if masks is None else masks.flip(-1)
    return image.contiguous(), tidy(Objects(boxes, objects.labels, masks), (out_height, out_width))


def tidy(objects: Objects, size: tuple[int, int]) -> Objects:
    """Boxes tight around masks, or clipped; without objects of which nothing is seen."""
    boxes, labels, masks = objects
    if masks is not None:
        masks = masks.reshape(-1, *size)
        seen = masks.flatten(1).any(dim=1).bool()  # of uint8 `any` is uint8
        masks, labels = masks[seen].contiguous(), labels[seen]
        return Objects(tight_boxes(masks), labels, masks)
    limit = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype)
    boxes = boxes.clamp(min=0).minimum(limit)
    seen = ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST).all(dim=1)
    return Objects(boxes[seen].float(), labels[seen], None)


def tight_boxes(masks: Tensor) -> Tensor:
    """Masks [n, H, W], none empty -> float32 [n, 4] from the first to behind the last of their pixels."""
    out = torch.zeros(len(masks), 4)
    for axis, along in ((0, masks.any(dim=1)), (1, masks.any(dim=2))):  # [n, W], [n, H]
        number = torch.arange(along.shape[1])
        out[:, axis] = torch.where(along.bool(), number, along.shape[1]).amin(dim=1)
        out[:, axis + 2] = torch.where(along.bool(), number, -1).amax(dim=1) + 1
    return out


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[C, H, W] in any type, bilinear with antialiasing."""
    if image.shape[-2:] == size:
        return image
    batch = image[None].contiguous(memory_format=torch.channels_last)  # torch's fast path for uint8
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0].contiguous()


def fitted(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of an image that was resized to fit into a square."""
    factor = size / max(height, width)
    return max(1, min(size, round(height * factor))), max(1, min(size, round(width * factor)))


def _part(side: int, factor: float, size: int, where: float) -> tuple[int, int, int]:
    """(begin, length, length after resizing) of the part of one side that is seen."""
    length = side if side * factor <= size else max(1, min(side, round(size / factor)))
    return int(where * (side - length + 1)), length, max(1, min(size, round(length * factor)))
