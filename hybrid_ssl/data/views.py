"""Views of one image: boxes are drawn, cut, resized and coloured; the image is decoded once for all of them.

Order, as in DINO (arXiv 2104.14294) and MoCo v3 (arXiv 2104.02057): crop, flip, jitter, gray, blur, solarize; the
normalisation happens later on the device, so that uint8 travels. Boxes follow torchvision's RandomResizedCrop: ten
tries, then the largest central box within the ratio. Everything is a function of (seed, epoch, sample, view):
geometry and colour have a generator each, so that a view which is `like` another gets the same boxes and flips
(BEiT's second, smaller picture, arXiv 2106.08254), and the same colours where its settings are the same.

Geometry (`draw_boxes`) knows no pixels and `cut` no random numbers: another modality of the same image is cut by the
same boxes. Legend: C channels, V crops; images are uint8 [C, H, W], a view uint8 [V, C, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .colour import apply_colour, draw_colour, has_colour
from .cutpaste import plant
from .order import keyed
from .settings import ViewSettings

_TRIES = 10  # torchvision


class Box(NamedTuple):
    """Where a crop comes from, in pixels of the image, and how it is flipped."""

    top: int
    left: int
    height: int
    width: int
    hflip: bool = False
    vflip: bool = False
    turns: int = 0
    """quarter turns after the flips, against the clock"""


class Views:
    """All view groups of a recipe, for one image at a time.

    Args:
        settings: view name -> its settings.
        jitter: `fast` or `exact`, see `colour.py`.

    Raises:
        ValueError: if a view is `like` one that does not exist, is `like` a third, or has another number of crops.
    """

    def __init__(self, settings: Mapping[str, ViewSettings], jitter: Literal["fast", "exact"] = "fast") -> None:
        self.settings, self.jitter = dict(settings), jitter
        self._coloured = {name for name, view in self.settings.items() if has_colour(view)}
        for name, view in self.settings.items():
            _check_like(name, view, self.settings)

    def __call__(
        self,
        image: Tensor,
        seed: int,
        epoch: int,
        sample_id: int,
        modality: Callable[[str, Box, tuple[int, int]], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """uint8 [C, H, W] -> {view: uint8 [V, C, h, w]}; `modality` cuts a box out of another modality of the image."""
        height, width = image.shape[-2:]
        out = {}
        for name, view in self.settings.items():
            if view.corrupt is not None:
                continue  # made from the finished crops of another view, see samples.py
            base = view.like or name
            boxes = draw_boxes(self.settings[base], height, width, keyed(seed, epoch, sample_id, f"{base}/box"))
            if view.modality is not None:
                assert modality is not None
                out[name] = torch.stack([modality(view.modality, box, view.height_width) for box in boxes])
                continue
            size = (view.height_width[0] + view.shift, view.height_width[1] + view.shift)
            crops = [cut(image, box, size, view.interpolation) for box in boxes]
            if view.shift:
                rng = keyed(seed, epoch, sample_id, f"{name}/shift")
                crops = [_window(crop, view, rng) for crop in crops]
            if name in self._coloured:
                rng = keyed(seed, epoch, sample_id, f"{base}/colour")
                crops = [self._colour(crop, view, number, rng) for number, crop in enumerate(crops)]
            if view.cutpaste:
                rng = keyed(seed, epoch, sample_id, f"{base}/defect")
                crops = [plant(kind, crop, rng, self.jitter) for kind, crop in zip(view.cutpaste, crops, strict=True)]
            out[name] = torch.stack(crops)
        return out

    def _colour(self, crop: Tensor, view: ViewSettings, number: int, rng: Random) -> Tensor:
        return apply_colour(crop, draw_colour(view, number, rng), view.solarize_threshold, self.jitter)


def draw_boxes(view: ViewSettings, height: int, width: int, rng: Random) -> list[Box]:
    """The boxes of a view's crops in an image of `height` x `width`."""
    boxes: list[Box] = []
    for number in range(view.crops):
        if view.one_box and boxes:
            boxes.append(boxes[0]._replace(turns=number * view.turns))
            continue
        if view.crop == "center":
            box = center_box(height, width, view.height_width)
        else:
            box = _random_box(view, height, width, rng)
        boxes.append(box._replace(hflip=rng.random() < view.hflip, vflip=rng.random() < view.vflip))
    return boxes


def center_box(height: int, width: int, size: tuple[int, int]) -> Box:
    """The largest central box with the aspect of `size`: as if the short side were resized and the centre cut."""
    scale = min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def cut(image: Tensor, box: Box, size: tuple[int, int], interpolation: str) -> Tensor:
    """Cut `box`, resize it with antialiasing, flip and turn: uint8 [C, H, W] -> uint8 [C, h, w], contiguous."""
    crop = image[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    if (box.height, box.width) != size:
        # channels-last uint8 takes torch's AVX2 path: 0.18 ms for 300x400 -> 224, PIL needs 0.94 ms
        crop = crop.contiguous(memory_format=torch.channels_last)
        crop = F.interpolate(crop, size=size, mode=interpolation, antialias=True)
    flips = [axis for axis, flip in ((-1, box.hflip), (-2, box.vflip)) if flip]
    crop = crop.flip(flips) if flips else crop
    if box.turns:  # exact: an interpolated turn leaves traces that a net reads
        crop = crop.rot90(box.turns, (-2, -1))
    return crop[0].contiguous()


def _window(crop: Tensor, view: ViewSettings, rng: Random) -> Tensor:
    """The part of a crop, cut larger by `shift`, that the view shows."""
    height, width = view.height_width
    top, left = (int(rng.random() * view.shift) if view.like else 0 for _ in range(2))
    return crop[:, top : top + height, left : left + width].contiguous()


def _random_box(view: ViewSettings, height: int, width: int, rng: Random) -> Box:
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for _ in range(_TRIES):
        area = height * width * (view.scale[0] + (view.scale[1] - view.scale[0]) * rng.random())
        ratio = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w)
    h, w = height, width
    if width / height < view.ratio[0]:
        h = min(height, max(1, round(width / view.ratio[0])))
    elif width / height > view.ratio[1]:
        w = min(width, max(1, round(height * view.ratio[1])))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _check_like(name: str, view: ViewSettings, views: Mapping[str, ViewSettings]) -> None:
    if view.like is None:
        return
    if view.like not in views or view.like == name:
        others = ", ".join(other for other in views if other != name)
        raise ValueError(f"view {name!r} is like {view.like!r}; the other views are: {others}")
    other = views[view.like]
    if other.like is not None:
        raise ValueError(f"view {name!r} is like {view.like!r}, which is like {other.like!r}: name that one")
    if view.corrupt is not None and other.height_width != view.height_width:
        raise ValueError(f"view {name!r} corrupts {view.like!r} and has to have its size {other.size}, not {view.size}")
    if view.modality is not None and other.shift:
        raise ValueError(
            f"view {name!r} of modality {view.modality} is like {view.like!r}, which has a shift: take it out"
        )
    if other.crops != view.crops:
        raise ValueError(f"view {name!r} has {view.crops} crops, {view.like!r} has {other.crops}: they must be as many")
    if other.shift != view.shift:
        raise ValueError(
            f"view {name!r} has shift {view.shift}, {view.like!r} has {other.shift}: a shifted window "
            "and its partner come from the same larger crop, so both need the same shift"
        )
