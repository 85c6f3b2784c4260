"""Boxes with names and scores, and tinted masks, on an image that is large enough to read them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...monitor.pictures import font

_SIDE = 384  # pixels of the longer side at least
_TEXT = 13
_TINT = 0.45


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    scores: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """uint8 [C, H, W] -> uint8 [3, h, w] with boxes [n, 4], named by `classes`, and masks [n, H, W] in a class' colour.

    Of images with other than 3 channels the first three, or the first, are shown.
    """
    image = (image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)).cpu()
    factor = max(1, -(-_SIDE // max(image.shape[-2:])))
    picture = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).float()
    for number, label in enumerate(labels.tolist() if masks is not None else []):
        assert masks is not None
        cover = F.interpolate(masks[number][None, None].float().cpu(), scale_factor=factor, mode="nearest")[0]
        colour = torch.tensor(colour_of(label), dtype=torch.float32).view(3, 1, 1)
        picture = picture + cover * _TINT * (colour - picture)
    page = Image.fromarray(picture.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    pen = ImageDraw.Draw(page)
    order = range(len(labels)) if scores is None else scores.argsort().tolist()  # the best ones on top
    for number in order:
        label = int(labels[number])
        text = classes[label] if scores is None else f"{classes[label]} {float(scores[number]):.2f}"
        _box(pen, page.size, [float(side) * factor for side in boxes[number]], text, colour_of(label))
    return torch.from_numpy(np.array(page)).permute(2, 0, 1).contiguous()


def colour_of(label: int) -> tuple[int, int, int]:
    """A colour for each class: hues a golden section apart, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.75, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _box(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], box: Sequence[float], text: str, colour: tuple[int, int, int]
) -> None:
    pen.rectangle([box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)], outline=colour, width=2)
    width, height = pen.textlength(text, font(_TEXT)) + 6, _TEXT + 4
    left = min(max(0.0, box[0]), max(0.0, size[0] - width))
    top = box[1] - height if box[1] >= height else box[1]  # above the box where there is room
    pen.rectangle([left, top, left + width, top + height], fill=colour)
    pen.text((left + 3, top), text, (0, 0, 0), font(_TEXT))
