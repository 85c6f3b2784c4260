"""What is done to one training image: crop, flip, RandAugment, erasing; every number from the sample's generator.

Order as in MAE (arXiv 2111.06377) and BEiT (2106.08254). RandAugment (1909.13719) is timm's operations, in timm's
strengths. They draw from Python's global stream: it is lent to them, seeded from the sample's generator, and put back,
so that what they do is a function of the sample and nothing else notices. Which operations are run is drawn here (timm
asks NumPy's stream). Erasing (1708.04896) paints noise of the data's mean and deviation.

Images are uint8 [C, H, W] at both ends.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from ...data.settings import ViewSettings
from ...data.views import cut, draw_boxes
from .settings import AugmentSettings

_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_ERASED = (0.02, 1 / 3)  # share of the area, as timm, which MAE uses
_ASPECT = 0.3  # ... to 1 / 0.3
_TRIES = 10


class Augment:
    """Augmentation of training images.

    Args:
        cfg: the recipe's section.
        size: [height, width] of the result.
        mean, std: per channel in 0..1; new pixels at borders get the mean, erased ones noise.

    Raises:
        ValueError: `rand_augment` is not in timm's words.
    """

    def __init__(
        self, cfg: AugmentSettings, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.cfg, self.size = cfg, size
        self.view = ViewSettings(size=list(size), scale=cfg.scale, ratio=cfg.ratio, hflip=cfg.hflip, vflip=cfg.vflip)
        self.mean, self.std = ([255 * value for value in values] for values in (mean, std))
        self.rand = None if cfg.rand_augment is None else RandAugment(cfg.rand_augment, self.mean)

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        """uint8 [C, H, W] of any size -> uint8 [C, h, w]."""
        (box,) = draw_boxes(self.view, image.shape[-2], image.shape[-1], rng)
        image = cut(image, box, self.size, "bicubic")
        if self.rand is not None:
            image = self.rand(image, rng)
        return erase(image, self.mean, self.std, rng) if rng.random() < self.cfg.erase else image


class RandAugment:
    """timm's RandAugment; see the module.

    Args:
        words: e.g. `rand-m9-mstd0.5-inc1`.
        mean: per channel in 0..255.
    """

    def __init__(self, words: str, mean: Sequence[float]) -> None:
        self.whole = len(mean) in (1, 3)  # else each channel by itself
        colours = [tuple(map(round, mean))] if len(mean) == 3 else [round(value) for value in mean]
        try:
            made: list[Any] = [rand_augment_transform(words, {"img_mean": colour}) for colour in colours]
        except (AssertionError, ValueError, KeyError) as problem:
            raise ValueError(f"augment.rand_augment: {words!r} is not like rand-m9-mstd0.5-inc1 ({problem})") from None
        for op in (op for each in made for op in each.ops if op.name.startswith("Posterize")):
            op.level_fn = partial(_some_bits, op.level_fn)
        self.count = made[0].num_layers
        names = [op.name for op in made[0].ops]
        kept = [i for i, name in enumerate(names) if self.whole or name in _GEOMETRIC]
        self.ops: list[list[Callable[[Any], Any]]] = [[each.ops[i] for each in made] for i in kept]
        """for each operation: what does it to the whole picture, or to each channel"""

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        """uint8 [C, H, W] -> uint8 [C, H, W]."""
        pictures = _to_pictures(image, self.whole)
        for _ in range(self.count):
            operation, seed = self.ops[int(rng.random() * len(self.ops))], rng.getrandbits(64)
            for i, apply in enumerate(operation):
                with _lent_stream(seed):  # the same draws for each channel
                    pictures[i] = apply(pictures[i])
        arrays = [torch.from_numpy(np.array(picture)) for picture in pictures]  # [H, W, 3] or [H, W]
        return arrays[0].permute(2, 0, 1).contiguous() if arrays[0].ndim == 3 else torch.stack(arrays)


def erase(image: Tensor, mean: Sequence[float], std: Sequence[float], rng: Random) -> Tensor:
    """A rectangle of noise; the image as it is when none fits in ten tries. `mean` and `std` are in 0..255."""
    channels, height, width = image.shape
    for _ in range(_TRIES):
        area = height * width * (_ERASED[0] + (_ERASED[1] - _ERASED[0]) * rng.random())
        aspect = math.exp(math.log(_ASPECT) * (1 - 2 * rng.random()))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            noise = torch.randn(channels, h, w, generator=torch.Generator().manual_seed(rng.getrandbits(63)))
            noise = noise * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
            image = image.clone()
            image[:, top : top + h, left : left + w] = noise.round_().clamp_(0, 255).to(torch.uint8)
            return image
    return image


def _some_bits(level_fn: Callable[..., tuple[int]], level: float, hparams: Any) -> tuple[int]:
    """timm asks for 0 bits at the strongest levels: a black picture once, an error of newer Pillows."""
    return (max(1, level_fn(level, hparams)[0]),)


def _to_pictures(image: Tensor, whole: bool) -> list[Image.Image]:
    if whole and len(image) == 3:
        return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())]
    return [Image.fromarray(channel.numpy()) for channel in image]


@contextmanager
def _lent_stream(seed: int) -> Iterator[None]:
    """Python's global random stream starts from `seed` meanwhile."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
