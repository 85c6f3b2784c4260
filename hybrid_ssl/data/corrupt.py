"""GMML: rectangles of a crop are painted over, or come from another image, until a share of the pixels is corrupted.

Source: Atito, Awais, Kittler, "SiT: Self-supervised vIsion Transformer", arXiv 2104.03602 (group masked model
learning); written from a fact sheet, the repository carries no licence and was not used. Half of the images lose 50 %
of their pixels; the other half gets 30 % from another image, at the same place of the same view. The last rectangle
may overshoot. Rectangles grow down and to the right, as released, so the top left corner is hit least. The donor is any
other image of the data set, never the image itself, which would corrupt nothing.
Every number comes from a keyed generator. Shapes: V crops, C channels.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from .settings import CorruptSettings


def corrupt(crops: Tensor, donor: Tensor | None, settings: CorruptSettings, rng: Random) -> tuple[Tensor, Tensor]:
    """Corrupt the crops of one image.

    Args:
        crops: uint8 [V, C, h, w].
        donor: the same crops of another image, or None: paint.

    Returns:
        uint8 [V, C, h, w], and where: bool [V, h * w]. A donor's pixel counts even where it has the same value.
    """
    size = (crops.shape[2], crops.shape[3])
    share = settings.lost if donor is None else settings.replaced
    where = torch.stack([draw_rectangles(size, share, settings, rng) for _ in crops])  # [V, h, w]
    source = _paint(crops, settings) if donor is None else donor
    return torch.where(where.unsqueeze(1), source, crops), where.flatten(1)


def draw_rectangles(size: tuple[int, int], share: float, settings: CorruptSettings, rng: Random) -> Tensor:
    """Rectangles on the grid until `share` of the pixels are in one: bool [h, w]."""
    hidden = torch.zeros(size, dtype=torch.bool)
    count, wanted = 0, share * hidden.numel()
    while count < wanted:
        (top, height), (left, width) = (_span(side, settings, rng) for side in size)
        rectangle = hidden[top : top + height, left : left + width]
        count += height * width - int(rectangle.sum())
        rectangle.fill_(True)
    return hidden


def _span(side: int, settings: CorruptSettings, rng: Random) -> tuple[int, int]:
    """First pixel and length, in steps of `align`: uniform start, uniform length, cut off at the end."""
    step = settings.align
    start = int(rng.random() * (side // step)) * step
    longest = max(1, int(settings.largest * side / step))
    return start, min((1 + int(rng.random() * longest)) * step, side - start)


def _paint(crops: Tensor, settings: CorruptSettings) -> Tensor:
    if settings.fill is None:
        return crops.float().mean((2, 3), keepdim=True).round().to(torch.uint8).expand_as(crops)
    if len(settings.fill) != crops.shape[1]:
        raise ValueError(f"corrupt.fill has {len(settings.fill)} values for images of {crops.shape[1]} channels")
    return torch.tensor(settings.fill, dtype=torch.uint8).view(1, -1, 1, 1).expand_as(crops)
