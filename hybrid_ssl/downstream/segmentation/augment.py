"""Training crops: image and mask are resized, cropped, flipped and coloured together.

As mmsegmentation's ADE20K pipeline (RandomResize, RandomCrop with cat_max_ratio, RandomFlip, PhotoMetricDistortion),
except that the crop's box is found in the image and resized once, which gives the same crops for less work, and that
colour jitter is the one of pretraining. Where an enlarged image is smaller than the crop, it lies at the top left, the
rest is the mean colour and is ignored. Every number comes from the given generator.

Shapes: C channels, H x W pixels of the image, h x w of the crop; the image is uint8, the mask int16.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from ...data.colour import apply_colour, draw_colour
from ...data.modalities import cut_map
from ...data.settings import ViewSettings
from ...data.views import Box, cut
from .metrics import IGNORED
from .settings import SegmentationAugment

_TRIES = 10  # mmsegmentation
_LOOK = 64  # rows and columns of a crop in which classes are counted


class Augment:
    """Calling it makes one crop.

    Args:
        cfg: the recipe's section.
        fill: colour of pixels outside of the image, 0..255 for each channel.
    """

    def __init__(self, cfg: SegmentationAugment, fill: Sequence[int]) -> None:
        self.cfg, self.size = cfg, cfg.height_width
        self.fill = torch.tensor(list(fill), dtype=torch.uint8).view(-1, 1, 1)
        self.colour = None if cfg.jitter is None else ViewSettings(size=list(self.size), jitter=cfg.jitter)

    def __call__(self, image: Tensor, mask: Tensor, rng: Random) -> tuple[Tensor, Tensor]:
        """uint8 [C, H, W], int16 [H, W] -> uint8 [C, h, w], int16 [h, w]."""
        box, size = self._box(mask, rng)
        box = box._replace(hflip=rng.random() < self.cfg.hflip, vflip=rng.random() < self.cfg.vflip)
        crop, labels = cut(image, box, size, "bilinear"), cut_map(mask[None], box, size)
        if self.colour is not None:
            crop = apply_colour(crop, draw_colour(self.colour, 0, rng), 0.5, "fast")
        if size == self.size:
            return crop, labels[0]
        whole = self.fill.expand(-1, *self.size).clone()
        ids = torch.full(self.size, IGNORED, dtype=mask.dtype)
        whole[:, : size[0], : size[1]] = crop
        ids[: size[0], : size[1]] = labels[0]
        return whole, ids

    def _box(self, mask: Tensor, rng: Random) -> tuple[Box, tuple[int, int]]:
        """A box of the image that no class fills too much of, and the size that it gets."""
        height, width = mask.shape
        low, high = self.cfg.scale
        factor = low + (high - low) * rng.random()
        if self.cfg.short_side is not None:
            factor *= self.cfg.short_side / min(height, width)
        sides = [min(have, max(1, round(want / factor))) for have, want in zip(mask.shape, self.size, strict=True)]
        size = (_side(sides[0], factor, self.size[0]), _side(sides[1], factor, self.size[1]))
        for _ in range(_TRIES):
            top = int(rng.random() * (height - sides[0] + 1))
            left = int(rng.random() * (width - sides[1] + 1))
            if self.cfg.cat_max_ratio == 1 or self._is_mixed(mask[top : top + sides[0], left : left + sides[1]]):
                break
        return Box(top, left, sides[0], sides[1]), size

    def _is_mixed(self, labels: Tensor) -> bool:
        """Whether there are several classes and none has too large a share."""
        rows, columns = (max(1, side // _LOOK) for side in labels.shape)
        some = labels[::rows, ::columns]
        counts = torch.bincount(some[some != IGNORED].long())
        return bool((counts > 0).sum() > 1 and counts.max() < self.cfg.cat_max_ratio * counts.sum())


def _side(pixels: int, factor: float, most: int) -> int:
    return min(most, max(1, round(pixels * factor)))
