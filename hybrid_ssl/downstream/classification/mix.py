"""Mixup (arXiv 1710.09412) and cutmix (1905.04899) of a batch, and the targets that go with them.

timm's `Mixup` draws from NumPy's global stream, so a resumed run would differ; this draws from the batch's generator,
with timm's arithmetic: one share for the whole batch, every image with the one at the mirrored place. Images stay
uint8 (timm's fast path does the same): rounding costs half of 1/255.

Shapes: B images, K classes.
"""

from __future__ import annotations

import math
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import MixSettings


def soft(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """int64 [B] -> float [B, K]: `smoothing` is spread evenly over all classes."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(cfg: MixSettings, images: Tensor, targets: Tensor, rng: Random) -> tuple[Tensor, Tensor]:
    """Mix every image with its partner.

    Args:
        images: uint8 [B, C, H, W].
        targets: float [B, K].

    Returns:
        New tensors of the same shapes and types.
    """
    if not (cfg.mixup or cfg.cutmix) or rng.random() >= cfg.p:
        return images, targets
    use_cutmix = rng.random() < (cfg.switch if cfg.mixup and cfg.cutmix else float(cfg.cutmix > 0))
    alpha = cfg.cutmix if use_cutmix else cfg.mixup
    share = rng.betavariate(alpha, alpha)  # of an image itself
    partners = images.flip(0)
    if use_cutmix:
        height, width = images.shape[-2:]
        top, bottom, left, right = _rectangle(height, width, share, rng)
        images = images.clone()
        images[..., top:bottom, left:right] = partners[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = torch.lerp(partners.float(), images.float(), share).round_().to(torch.uint8)
    return images, torch.lerp(targets.flip(0), targets, share)


def _rectangle(height: int, width: int, share: float, rng: Random) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of `1 - share` of the area, its centre anywhere, cut off at the borders."""
    side = math.sqrt(1 - share)
    h, w = int(height * side), int(width * side)
    y, x = int(rng.random() * height), int(rng.random() * width)
    return max(0, y - h // 2), min(height, y + h // 2), max(0, x - w // 2), min(width, x + w // 2)
