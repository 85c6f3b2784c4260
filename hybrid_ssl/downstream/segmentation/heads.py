"""From an encoder's maps to scores of classes: a linear head, and UPerNet.

`LinearHead` is DINOv2's linear evaluation (arXiv 2304.07193): BatchNorm and a 1x1 convolution on the last map, or on
several layers side by side, which for a Swin are its stages.

`UPerHead` is UPerNet (arXiv 1807.10221): pyramid pooling (arXiv 1612.01105) on the coarsest map, a feature pyramid with
lateral connections, all levels fused at the finest one. It wants a pyramid. A Swin's stages are one; as in its official
segmentation, each gets a LayerNorm of its own (the last one has the encoder's). A ViT's four maps have one stride: as
in BEiT (arXiv 2106.08254) and MAE, which have patches of 16 pixels, they are brought to strides 4, 8, 16, 32 by
transposed convolutions and max pooling, here from any patch size.

Norms. `batch` is BatchNorm over the images of all processes, as in the papers, on any device; gradient accumulation
alone changes it. `group` (arXiv 1803.08494, 16 channels a group as there) depends on no batch at all, but learns
more slowly: tokens of a ViT have a large part in common, which BatchNorm takes off every channel and GroupNorm does
not. Overfitting some scenes of 128 pixels for 150 steps, batch reached 0.26 mIoU and group 0.09.

Shapes: B images, D channels of a map, h x w its sides (rounded up), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.batchnorm2d import SyncBatchNorm2d
from ..encoders import Taps, stage_norms
from .settings import SegmentationModel

Norm = Literal["group", "batch"]

_FINEST = 4  # pixels of a token in the finest level of the pyramid
_POOLS = (1, 2, 3, 6)  # rows and columns of the pooled maps, PSPNet's


class LinearHead(nn.Module):
    """BatchNorm and a 1x1 convolution on the last map, or on all of them, side by side at the finest one's size."""

    def __init__(self, channels: Sequence[int], classes: int, every: bool = False) -> None:
        super().__init__()
        self.used = list(channels) if every else list(channels[-1:])
        self.norm = SyncBatchNorm2d(sum(self.used))
        self.classify = _classifier(sum(self.used), classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w] of each tap -> [B, K, h, w] at the finest used one's resolution."""
        used = maps[-len(self.used) :]
        x = torch.cat([_resized(each, used[0]) for each in used], dim=1)
        out: Tensor = self.classify(self.norm(x))
        return out


class ConvHead(nn.Module):
    """The auxiliary head (FCN, arXiv 1411.4038): one 3x3 convolution and the classifier, on the last map but one."""

    def __init__(self, channels: Sequence[int], width: int, classes: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.which = max(0, len(channels) - 2)
        self.conv = ConvNorm(channels[self.which], width, 3, norm)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), _classifier(width, classes))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.classify(self.conv(maps[self.which]))
        return out


class UPerHead(nn.Module):
    """Pyramid pooling and a feature pyramid.

    Args:
        taps: where the encoder is read; maps of one stride are made a pyramid.
        cfg: width, norm and dropout.
        classes: K.
    """

    def __init__(self, taps: Taps, cfg: SegmentationModel, classes: int) -> None:
        super().__init__()
        width, norm, channels = cfg.channels, cfg.norm, taps.channels
        self.levels = Levels(taps, norm)
        self.lateral = nn.ModuleList(ConvNorm(c, width, 1, norm) for c in channels[:-1])
        self.pooling = PyramidPooling(channels[-1], width, norm)
        self.smooth = nn.ModuleList(ConvNorm(width, width, 3, norm) for _ in channels[:-1])
        self.fuse = ConvNorm(width * len(channels), width, 3, norm)
        self.classify = nn.Sequential(nn.Dropout2d(cfg.dropout), _classifier(width, classes))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w] of each tap -> [B, K, h, w] at the finest level's resolution."""
        maps = self.levels(maps)
        top = self.pooling(maps[-1])
        down = [top]  # from coarse to fine
        for lateral, finer in zip(reversed(self.lateral), reversed(maps[:-1]), strict=True):
            side = lateral(finer)
            down.append(side + _resized(down[-1], side))
        fine = [smooth(x) for smooth, x in zip(self.smooth, down[:0:-1], strict=True)] + [top]
        out: Tensor = self.classify(self.fuse(torch.cat([_resized(x, fine[0]) for x in fine], dim=1)))
        return out


class Levels(nn.ModuleList):
    """Maps as a pyramid of levels, fine to coarse: a ViT's are resampled, a Swin's normed."""

    def __init__(self, taps: Taps, norm: Norm) -> None:
        if len(set(taps.strides)) > 1:
            super().__init__(stage_norms(taps))
            return
        up = round(math.log2(taps.strides[0] / _FINEST))  # how often the finest level doubles the sides
        super().__init__(_resample(c, up - i, norm) for i, c in enumerate(taps.channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self, maps, strict=True)]


class PyramidPooling(nn.Module):
    """The map beside averages of its quarters, ninths, ..., and of all: [B, D, h, w] -> [B, width, h, w]."""

    def __init__(self, channels: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvNorm(channels, width, 1, norm)) for n in _POOLS
        )
        self.bottleneck = ConvNorm(channels + len(_POOLS) * width, width, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bottleneck(torch.cat([x, *(_resized(branch(x), x) for branch in self.branches)], dim=1))
        return out


class ConvNorm(nn.Sequential):
    """Convolution without bias, norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, norm: Norm) -> None:
        super().__init__(nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False), _norm(width, norm))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def _resample(channels: int, doublings: int, norm: Norm) -> nn.Module:
    """Sides x 2 ** doublings; negative: / 2 ** -doublings."""
    if doublings <= 0:
        return nn.MaxPool2d(2**-doublings, ceil_mode=True) if doublings else nn.Identity()
    layers: list[nn.Module] = []
    for i in range(doublings):
        layers += [_norm(channels, norm), nn.GELU()] if i else []
        layers += [nn.ConvTranspose2d(channels, channels, 2, stride=2)]
    return nn.Sequential(*layers)


def _norm(channels: int, norm: Norm) -> nn.Module:
    if norm == "batch":
        return SyncBatchNorm2d(channels)
    groups = max(1, channels // 16)  # of 16: pooling leaves one value a channel, and a group of 2 would say nothing
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)  # mmsegmentation
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _resized(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
