"""Feature pyramids over an encoder's dense maps: ViTDet's for one stride, FPN for a Swin's stages.

A ViT has one resolution. ViTDet's simple feature pyramid (arXiv 2203.16527) makes every level from its last map alone:
finer ones by transposed convolutions, coarser ones by pooling, then a 1x1 and a 3x3 convolution, each with a
LayerNorm over channels. A Swin's stages already are levels: each is normed, as in Swin's own detection, and FPN's
top-down path (arXiv 1612.03144) joins them. Both add one more level by pooling, for proposals of the largest objects.

Detectors want strides that are powers of two. A ViT whose patches are not (14 pixels) is shown the picture at 14/16 of
its size, so that its map has stride 16 exactly.

Shapes: B images, D channels of the encoder, F of the pyramid; a level of stride s is [B, F, H/s, W/s].
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from ..encoders import Taps, stage_norms

_VIT_STRIDES = (4, 8, 16, 32)  # ViTDet


class SimplePyramid(nn.Module):
    """ViTDet's: [B, D, h, w] of stride `stride` -> one map for each of `strides`."""

    def __init__(self, dim: int, stride: int, strides: Sequence[int], channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList([_level(dim, stride, wanted, channels) for wanted in strides])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self.levels]


class StagePyramid(nn.Module):
    """FPN over the normed stages whose strides are wanted; coarser levels than the last stage are pooled from it."""

    def __init__(self, taps: Taps, strides: Sequence[int], channels: int) -> None:
        super().__init__()
        missing = [s for s in strides if s not in taps.strides and s < taps.strides[-1]]
        if missing or strides[0] > taps.strides[-1]:
            raise ValueError(
                f"model.strides {list(strides)}: the encoder's stages have the strides {list(taps.strides)}; "
                "begin with one of them, or give null"
            )
        self.used = [i for i, stride in enumerate(taps.strides) if stride in strides]
        self.pooled = len(strides) - len(self.used)
        norms = stage_norms(taps)
        self.norms = nn.ModuleList(norms[i] for i in self.used)
        self.fpn = FeaturePyramidNetwork([taps.channels[i] for i in self.used], channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        named = OrderedDict((str(i), norm(maps[i])) for i, norm in zip(self.used, self.norms, strict=True))
        levels = list(self.fpn(named).values())
        for _ in range(self.pooled):
            levels.append(_coarser(levels[-1]))
        return levels


class Pyramid(nn.Module):
    """The pyramid that fits an encoder, plus one pooled level.

    Args:
        taps: of the encoder.
        strides: of the levels, or None for the usual ones.
        channels: of each level.

    Attributes:
        strides: of all levels.
        unit: both sides of images are multiples of it.
        shown: what part of its size an image is shown to the encoder at: 1, or 14/16 for patches of 14 pixels.

    Raises:
        ValueError: `strides` are none that the encoder's stages can give.
    """

    def __init__(self, taps: Taps, strides: Sequence[int] | None, channels: int) -> None:
        super().__init__()
        self.shown, own = shown_at(taps)
        wanted = tuple(strides or (_VIT_STRIDES if len(set(own)) == 1 else own))
        self.levels: nn.Module
        if len(set(own)) == 1:
            self.levels = SimplePyramid(taps.channels[-1], own[-1], wanted, channels)
        else:
            self.levels = StagePyramid(Taps(taps.indices, taps.channels, own), wanted, channels)
        self.strides = (*wanted, 2 * wanted[-1])
        self.unit = unit_of(taps, strides)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels: list[Tensor] = self.levels(maps)
        return [*levels, _coarser(levels[-1])]


def unit_of(taps: Taps, strides: Sequence[int] | None) -> int:
    """Pixels that the sides of images are multiples of: whole cells on every level that is no pooled extra."""
    own = shown_at(taps)[1]
    return max(*own, *(strides or (_VIT_STRIDES if len(set(own)) == 1 else own)))


def shown_at(taps: Taps) -> tuple[float, tuple[int, ...]]:
    """(part of its size at which the encoder sees an image, strides of its maps then: powers of two)."""
    finest = taps.strides[0]
    power = 1 << round(math.log2(finest))
    return finest / power, tuple(stride * power // finest for stride in taps.strides)


def show(images: Tensor, part: float) -> Tensor:
    """[B, C, H, W] at `part` of its size."""
    if part == 1:
        return images
    size = [round(side * part) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def _level(dim: int, stride: int, wanted: int, channels: int) -> nn.Sequential:
    """Width is halved with each doubling of the resolution, as in ViTDet, but kept at 8 at least."""
    steps: list[nn.Module] = []
    width = dim
    for step in range(int(math.log2(stride / wanted)) if wanted < stride else 0):
        half = max(8, width // 2)
        steps += [LayerNorm2d(width), nn.GELU()] if step else []
        steps.append(nn.ConvTranspose2d(width, half, 2, 2))
        width = half
    if wanted > stride:
        steps.append(nn.MaxPool2d(wanted // stride))
    return nn.Sequential(
        *steps,
        nn.Conv2d(width, channels, 1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


def _coarser(level: Tensor) -> Tensor:
    return torch.max_pool2d(level, 1, 2)  # FPN's: every second cell
