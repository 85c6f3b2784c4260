"""Mean and standard deviation of the pixels, per channel in 0..1: ImageNet's, the recipe's, or measured.

Each sampled image counts the same, as it does in training, whatever its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode import Decoder
from .settings import DataSettings
from .sources import Source

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
_MEASURED = 2000  # images; the error of the mean is then below 0.01 on photographs
_FLAT = 1e-3  # a smaller std, of a constant channel, would blow up noise


def resolve_mean_std(cfg: DataSettings, source: Source) -> tuple[list[float], list[float]]:
    """What `data.mean` and `data.std` say, as one number a channel.

    `imagenet` means the three published numbers; for gray images their average; other channel counts are refused.

    Raises:
        ValueError: a list of another length than `data.channels`, or `imagenet` for images it says nothing about.
    """
    measured = measure(source, Decoder.of(cfg)) if "auto" in (cfg.mean, cfg.std) else ([], [])
    return (
        _resolve("mean", cfg.mean, cfg.channels, IMAGENET_MEAN, measured[0]),
        _resolve("std", cfg.std, cfg.channels, IMAGENET_STD, measured[1]),
    )


def measure(source: Source, decoder: Decoder, images: int = _MEASURED) -> tuple[list[float], list[float]]:
    """Mean and std of a sample that depends on the number of images alone. Broken images are left out."""
    sums: list[Tensor] = []
    for _, payload, _ in source.sample(images):
        try:
            pixels = decoder(payload).flatten(1).double() / 255  # [C, H*W]
        except ValueError:
            continue  # the loader counts and names it
        sums.append(torch.stack((pixels.mean(1), pixels.square().mean(1))))
    if not sums:
        raise ValueError(f"mean and std cannot be measured: none of the images can be read in {source.describe()}")
    mean, square = torch.stack(sums).mean(0)
    std = (square - mean.square()).clamp_min(_FLAT**2).sqrt()
    return [round(m, 6) for m in mean.tolist()], [round(s, 6) for s in std.tolist()]


def _resolve(
    name: str, given: str | list[float], channels: int, imagenet: list[float], auto: list[float]
) -> list[float]:
    if isinstance(given, list):
        if len(given) != channels:
            raise ValueError(f"data.{name} has {len(given)} numbers for {channels} channels")
        if name == "std" and min(given) <= 0:
            raise ValueError(f"data.std must be positive, got {given}")
        return given
    if given == "auto":
        return auto
    if channels == 3:
        return imagenet
    if channels == 1:
        return [round(sum(imagenet) / 3, 6)]
    raise ValueError(f"data.{name}=imagenet says nothing about {channels} channels: use data.{name}=auto or a list")
