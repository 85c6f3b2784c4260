"""The segmenter: encoder, head, loss, and prediction of images of any size.

Loss. Cross entropy at the mask's resolution, summed over the labelled pixels and divided by ALL pixels of the crops
(mmsegmentation's default): crops have one size, so the mean over micro-batches and processes is exactly that of one
large batch, and every labelled pixel of a step weighs the same. Divided by the labelled ones instead, the pixels of a
crop that is mostly ignored would weigh more than others, by how the batch was divided.

Shapes: B images, C channels, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.precision import full_precision, no_autocast
from ..encoders import Normalise, dense_maps, rebuild, taps_of
from .drawing import painted
from .heads import ConvHead, LinearHead, UPerHead
from .metrics import IGNORED
from .settings import SegmentationModel
from .sliding import Size, slide


class Segmenter(nn.Module):
    """A timm encoder with a segmentation head; `encoder.*` in its state dict are timm's own keys.

    Args:
        encoder: timm ViT or Swin, as `open_encoder` gives it.
        mean, std: what its weights expect, per channel in 0..1.
        classes: names.
        cfg: the head.
        window: height and width of sliding windows; None: whole images.
        stride: of the windows.
        short_side: images are resized to it before they are predicted; None: as they are.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str],
        cfg: SegmentationModel,
        window: Size | None = None,
        stride: Size | None = None,
        short_side: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.normalise = encoder, Normalise(mean, std)
        self.classes = list(classes)
        self.window, self.stride, self.short_side = window, stride, short_side
        self.taps, self.auxiliary_weight = taps_of(encoder), cfg.auxiliary
        count = len(classes)
        linear = cfg.head == "linear"
        self.head: nn.Module
        if linear:
            self.head = LinearHead(self.taps.channels, count, every=cfg.maps == "all")
        else:
            self.head = UPerHead(self.taps, cfg, count)
        self.auxiliary: ConvHead | None = None
        if cfg.auxiliary and not linear:
            self.auxiliary = ConvHead(self.taps.channels, cfg.auxiliary_channels, count, cfg.norm, cfg.dropout)

    def forward(self, images: Any, targets: Tensor | None = None) -> Any:
        """Training: {"name": loss}; else a list of class maps, int64 [H, W].

        Args:
            images: uint8 [B, C, H, W]; without targets also a list of [C, H, W].
            targets: class numbers [B, H, W], IGNORED where there is none.
        """
        if targets is None:
            batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
            return [found for batch in batches for found in self.scores(batch).argmax(dim=1)]
        maps = dense_maps(self.encoder, self.normalise(images), self.taps)
        losses = {"segment": pixel_loss(self.head(maps), targets)}
        if self.auxiliary is not None:
            losses["auxiliary"] = self.auxiliary_weight * pixel_loss(self.auxiliary(maps), targets)
        return losses

    def scores(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float [B, K, H, W], by `short_side` and windows."""
        size = images.shape[-2:]
        pixels = self.normalise(images)
        if self.short_side is not None:
            factor = self.short_side / min(size)
            sides = [max(1, round(side * factor)) for side in size]
            pixels = F.interpolate(pixels, size=sides, mode="bilinear", antialias=True)
        if self.window is None or self.stride is None:
            found = self._upsampled(pixels)
        else:
            found = slide(self._upsampled, pixels, self.window, self.stride)
        return found if found.shape[-2:] == size else _upsample(found, size)

    def predict(self, image: Tensor) -> dict[str, Any]:
        """uint8 [C, H, W] -> `labels`, int64 [H, W], and `share`, class name -> its share of the pixels."""
        device = next(self.parameters()).device
        with torch.inference_mode():
            (labels,) = self([image.to(device)])
        counts = torch.bincount(labels.flatten(), minlength=len(self.classes)) / labels.numel()
        share = {name: float(counts[k]) for k, name in enumerate(self.classes) if counts[k] > 0}
        return {"labels": labels.cpu(), "share": share}

    def draw(self, image: Tensor, found: dict[str, Any]) -> Tensor:
        """uint8 [3, H, W]: the image under the colours of its classes."""
        return painted(image, found["labels"])

    def _upsampled(self, pixels: Tensor) -> Tensor:
        return _upsample(self.head(dense_maps(self.encoder, pixels, self.taps)), pixels.shape[-2:])


def pixel_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of [B, K, h, w] against [B, H, W]: sum over the labelled pixels / all pixels."""
    with no_autocast(scores):
        fine = _upsample(scores, targets.shape[-2:])
        return F.cross_entropy(fine, targets.long(), ignore_index=IGNORED, reduction="sum") / targets.numel()


def restore(config: dict[str, Any]) -> Segmenter:
    """The model of `SegmentationTask.config()` with random weights, in eval mode."""
    return Segmenter(
        rebuild(config["encoder"]),
        config["mean"],
        config["std"],
        config["classes"],
        SegmentationModel.model_validate(config["model"]),
        window=tuple(config["window"]) if config["window"] else None,
        stride=tuple(config["stride"]) if config["stride"] else None,
        short_side=config["short_side"],
    ).eval()


def _upsample(scores: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(full_precision(scores), size=tuple(size), mode="bilinear", align_corners=False)
