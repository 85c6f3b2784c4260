"""Colour of one crop: jitter, gray, blur, solarize, with every number drawn beforehand from a keyed generator.

Two ways to jitter. `exact` is torchvision's ColorJitter: brightness, contrast, saturation and hue in random order,
each rounded and clamped to 0..255. `fast` composes the same draws in the same order, and gray after them, into ONE
3x4 matrix: the four are affine in the colour (contrast through the mean gray of the crop), except that hue becomes a
rotation about the gray axis instead of a shift in HSV, and that clamping happens once at the end. On strongly
coloured pixels the two differ visibly in brightness after a hue shift.

Saturation, hue and gray are defined for 3 channels only: with any other number of channels they are skipped, and
brightness and contrast stay. Images are uint8 [C, H, W] at both ends, float32 in 0..255 in between.
"""

from __future__ import annotations

import math
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import JitterSettings, PerCrop, ViewSettings

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601
_TO_GRAY = np.tile(_LUMA, (3, 1))
_NO_JITTER = JitterSettings(p=0.0, brightness=0, contrast=0, saturation=0, hue=0)
_BLUR_REACH = 3.0  # kernel radius in sigmas: 99.7 % of the weight


class Colour(NamedTuple):
    """What happens to one crop. A factor of 1 or a shift of 0 changes nothing."""

    order: tuple[str, ...]
    """the jitter's operations in their order; empty: no jitter"""
    factors: dict[str, float]
    gray: bool
    sigma: float
    """of the blur in pixels; 0: none"""
    solarize: bool


def has_colour(view: ViewSettings) -> bool:
    """Whether anything of this file can happen to the view."""
    return view.jitter is not None or any(np.any(value) for value in (view.gray, view.blur, view.solarize))


def draw_colour(settings: ViewSettings, crop: int, rng: Random) -> Colour:
    """Draw for one crop. The number of draws is constant, so that no setting shifts the draws of another."""
    jitter = settings.jitter or _NO_JITTER
    factors = {
        "brightness": _factor(rng, jitter.brightness),
        "contrast": _factor(rng, jitter.contrast),
        "saturation": _factor(rng, jitter.saturation),
        "hue": (2 * rng.random() - 1) * jitter.hue,
    }
    places = {name: rng.random() for name in factors}
    coins = [rng.random() for _ in range(4)]
    low, high = settings.blur_sigma
    sigma = low + (high - low) * rng.random()
    return Colour(
        order=tuple(sorted(factors, key=places.__getitem__)) if coins[0] < per_crop(jitter.p, crop) else (),
        factors=factors,
        gray=coins[1] < per_crop(settings.gray, crop),
        sigma=sigma if coins[2] < per_crop(settings.blur, crop) else 0.0,
        solarize=coins[3] < per_crop(settings.solarize, crop),
    )


def apply_colour(crop: Tensor, colour: Colour, threshold: float, mode: Literal["fast", "exact"]) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, H, W]. `threshold` (0..1) is the solarisation's."""
    if colour.order and mode == "exact":
        crop = _jitter_exactly(crop, colour)
    matrix = (colour.order and mode == "fast") or colour.gray
    if matrix or colour.sigma:
        pixels = crop.float()
        if matrix:
            pixels = _transform(pixels, colour if mode == "fast" else colour._replace(order=()))
        if colour.sigma:
            pixels = blur(pixels, colour.sigma)
        crop = pixels.add_(0.5).to(torch.uint8)  # rounds: the values are in 0..255
    return solarize(crop, threshold) if colour.solarize else crop


def per_crop(value: PerCrop, crop: int) -> float:
    """The probability that is meant for crop number `crop`."""
    return value[crop] if isinstance(value, list) else value


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of float [C, H, W], edges mirrored. Shifted sums: a depthwise convolution takes 3 times as long."""
    height, width = pixels.shape[-2:]
    radius = min(max(1, math.ceil(_BLUR_REACH * sigma)), height - 1, width - 1)
    if radius < 1:
        return pixels
    taps = [math.exp(-(i * i) / (2 * sigma * sigma)) for i in range(-radius, radius + 1)]
    taps = [tap / sum(taps) for tap in taps]
    padded = F.pad(pixels[None], (radius,) * 4, mode="reflect")[0]  # [C, H + 2r, W + 2r]
    rows = padded[:, :height] * taps[0]
    for i, tap in enumerate(taps[1:], 1):
        rows.add_(padded[:, i : i + height], alpha=tap)
    out = rows[:, :, :width] * taps[0]
    for i, tap in enumerate(taps[1:], 1):
        out.add_(rows[:, :, i : i + width], alpha=tap)
    return out


def solarize(crop: Tensor, threshold: float) -> Tensor:
    """Invert the values from `threshold` (0..1) up: uint8 -> uint8."""
    inverse = 255 - crop
    if threshold == 0.5:
        return torch.minimum(crop, inverse)  # the same, ten times faster
    return torch.where(crop >= threshold * 255, inverse, crop)


def _factor(rng: Random, strength: float) -> float:
    """torchvision: uniform in [max(0, 1 - strength), 1 + strength]."""
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * rng.random()


def _transform(pixels: Tensor, colour: Colour) -> Tensor:
    """Jitter and gray as one affine map of the channels, clamped: float [C, H, W] -> the same, perhaps in place."""
    means = pixels.mean((1, 2)).double().numpy() if colour.factors["contrast"] != 1 else np.zeros(len(pixels))
    if len(pixels) == 3:
        matrix, offset = (torch.from_numpy(part.astype(np.float32)) for part in colour_matrix(colour, means))
        pixels = torch.addmm(offset[:, None], matrix, pixels.reshape(3, -1)).view_as(pixels)
    else:
        gain, shift = _gain(colour, float(means.mean()))
        pixels = pixels.mul_(gain).add_(shift)
    return pixels.clamp_(0, 255)


def colour_matrix(colour: Colour, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The affine map of `colour` for an RGB crop with these channel means (0..255): float64 [3, 3] and [3]."""
    matrix, offset = np.eye(3), np.zeros(3)
    for name in colour.order:
        factor = colour.factors[name]
        if name == "brightness":
            matrix, offset = matrix * factor, offset * factor
        elif name == "contrast":  # blends with the mean gray, which is affine in the means
            gray = _LUMA @ (matrix @ means + offset)
            matrix, offset = matrix * factor, offset * factor + (1 - factor) * gray
        else:
            step = _rotate_hue(factor) if name == "hue" else np.eye(3) * factor + (1 - factor) * _TO_GRAY
            matrix, offset = step @ matrix, step @ offset
    if colour.gray:
        matrix, offset = _TO_GRAY @ matrix, _TO_GRAY @ offset
    return matrix, offset


def _gain(colour: Colour, mean: float) -> tuple[float, float]:
    """Brightness and contrast alone, for images that are not RGB: out = gain x in + shift."""
    gain, shift = 1.0, 0.0
    for name in colour.order:
        factor = colour.factors[name]
        if name == "brightness":
            gain, shift = gain * factor, shift * factor
        elif name == "contrast":
            gain, shift = gain * factor, shift * factor + (1 - factor) * (gain * mean + shift)
    return gain, shift


def _rotate_hue(shift: float) -> np.ndarray:
    """Hue shift (-0.5..0.5 of the circle) as a rotation about the gray axis of RGB, red towards green, as in HSV.

    Measured on random colours this is the least-squares best linear map; rotating I-Q of YIQ errs by 1.4 times as much.
    """
    sine, cosine = math.sin(2 * math.pi * shift) / math.sqrt(3), math.cos(2 * math.pi * shift)
    same, before, after = (1 + 2 * cosine) / 3, (1 - cosine) / 3 - sine, (1 - cosine) / 3 + sine
    return np.array([[same, before, after], [after, same, before], [before, after, same]])


def _jitter_exactly(crop: Tensor, colour: Colour) -> Tensor:
    """torchvision's own functions, in the drawn order."""
    from torchvision.transforms.v2 import functional as tv  # only this mode needs it; the import takes a second

    if crop.shape[0] not in (1, 3):
        return _transform(crop.float(), colour._replace(gray=False)).add_(0.5).to(torch.uint8)
    apply = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }
    for name in colour.order:
        crop = apply[name](crop, colour.factors[name])
    return crop
