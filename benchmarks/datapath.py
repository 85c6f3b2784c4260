"""From JPEG bytes to the crops of one image: ours, torchvision's transforms on PIL images, lightly's transforms.

Every pipeline decodes and makes the papers' views: MAE one crop of 224 pixels, DINO two of 224 and eight of 96. Ours
ends with uint8, because it normalises on the device; `+ normalised here` adds that work for comparison.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as tv

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.data.settings import JitterSettings, ViewSettings
from hybrid_ssl.data.views import Views

from .contestants import OURS
from .photos import make_photos
from .timing import Spread, ratios, take_turns
from .work import MEAN, STD

TASKS = ("mae", "dino")
LOCALS = 8
Pipeline = Callable[[bytes], Any]


@dataclass(frozen=True)
class DataResult:
    """A pipeline over ours."""

    task: str
    pipeline: str
    images: float
    """images a CPU second, median"""
    ratio: Spread
    """its seconds over ours"""


def compare_data(task: str, rounds: int, images: int, libraries: Sequence[str]) -> list[DataResult]:
    """Every pipeline over the same `images` files, in turns."""
    photos = make_photos(min(8, images))
    files = [photos[i % len(photos)] for i in range(images)]
    pipelines: dict[str, Pipeline] = {
        OURS: _ours(task),
        "ours, exact jitter": _ours(task, "exact"),
        "ours + normalised here": _ours(task, normalised=True),
        "torchvision on PIL": _torchvision(task),
    }
    if "lightly" in libraries:
        pipelines["lightly"] = _lightly(task)
    if task == "mae":
        del pipelines["ours, exact jitter"]  # MAE has none
    seconds = take_turns({name: _turn(pipeline, files) for name, pipeline in pipelines.items()}, rounds)
    each = {name: [turn[0] for turn in turns] for name, turns in seconds.items()}
    return [
        DataResult(task, name, images / statistics.median(own), ratios(own, each[OURS])) for name, own in each.items()
    ]


def _turn(pipeline: Pipeline, files: Sequence[bytes]) -> Callable[[], tuple[float]]:
    def turn() -> tuple[float]:
        random.seed(0)
        torch.manual_seed(0)
        start = time.process_time()
        for data in files:
            pipeline(data)
        return (time.process_time() - start,)

    return turn


def _ours(task: str, jitter: Literal["fast", "exact"] = "fast", normalised: bool = False) -> Pipeline:
    jittered: dict[str, Any] = {"hflip": 0.5, "jitter": JitterSettings(p=0.8), "gray": 0.2}
    settings = {"plain": ViewSettings(size=224, scale=[0.2, 1.0])}
    if task == "dino":
        settings = {
            "global": ViewSettings(crops=2, scale=[0.4, 1.0], blur=[1.0, 0.1], solarize=[0.0, 0.2], **jittered),
            "local": ViewSettings(crops=LOCALS, size=96, scale=[0.05, 0.4], blur=0.5, **jittered),
        }
    decode, views = Decoder(3), Views(settings, jitter)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
    numbers = iter(range(10**9))

    def pipeline(data: bytes) -> dict[str, Tensor]:
        crops = views(decode(data), 0, 0, next(numbers))
        return {name: (x.float() - mean) / std for name, x in crops.items()} if normalised else crops

    return pipeline


def _torchvision(task: str) -> Pipeline:
    """As the papers' code: PIL from decoding to the last transform."""
    end = [tv.ToTensor(), tv.Normalize(MEAN, STD)]
    if task == "mae":
        return _on_pil([tv.Compose([*_crop(224, (0.2, 1.0)), *end])])
    colour = [tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), tv.RandomGrayscale(0.2)]
    first = tv.Compose([*_crop(224, (0.4, 1.0)), *colour, _blur(1.0), *end])
    second = tv.Compose([*_crop(224, (0.4, 1.0)), *colour, _blur(0.1), tv.RandomSolarize(128, p=0.2), *end])
    local = tv.Compose([*_crop(96, (0.05, 0.4)), *colour, _blur(0.5), *end])
    return _on_pil([first, second, *[local] * LOCALS])


def _crop(side: int, scale: tuple[float, float]) -> list[Any]:
    bicubic = tv.InterpolationMode.BICUBIC
    return [tv.RandomResizedCrop(side, scale=scale, interpolation=bicubic), tv.RandomHorizontalFlip()]


def _blur(p: float) -> Any:
    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    return tv.RandomApply([tv.Lambda(blur)], p=p)


def _on_pil(transforms: Sequence[Callable[[Image.Image], Tensor]]) -> Pipeline:
    def pipeline(data: bytes) -> list[Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [transform(image) for transform in transforms]

    return pipeline


def _lightly(task: str) -> Pipeline:
    from lightly.transforms import DINOTransform, MAETransform

    transform = MAETransform(min_scale=0.2) if task == "mae" else DINOTransform(n_local_views=LOCALS)
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))
