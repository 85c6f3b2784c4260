"""torchvision's detectors around a timm encoder: Faster and Mask R-CNN, RetinaNet, FCOS.

What torchvision does for photographs of 800 pixels is replaced where it would be wrong here without an error: images
are normalised with the encoder's mean and std, not with ImageNet's; they are resized once, to fit into one fixed
square, so that nothing depends on the other images of a batch; the strides of the pyramid are known, not guessed from
sizes (rounded, and of the first batch only); anchors sit in the middle of their cells and stay float32 under autocast,
as do all logits and box offsets. Anchors of bf16 have steps of 4 pixels at 1000.

`Detector.encoder` is timm's model and the only place where its parameters are registered, so state-dict keys below
`encoder.` are timm's.

Shapes: B images, C channels, n objects of one image, M pixels of a mask's side in its box.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import nms

from ..encoders import Normalise, Taps, dense_maps
from .augment import fitted, resize
from .heads import build_detector
from .pictures import draw_objects
from .pyramid import Pyramid, show
from .settings import DetectionModel
from .windows import use_windows


class Detector(nn.Module):
    """An encoder, a pyramid and a detector; it is a `task.Fitted`.

    Args:
        encoder: timm's model.
        taps: where it is read.
        mean, std: what it expects.
        classes: names in the order of labels 0, 1, ...
        cfg: the recipe's section.

    In training `model(images, targets)` gives losses; targets are mappings with `boxes` [n, 4] as x1, y1, x2, y2,
    `labels` [n] and, for Mask R-CNN, `masks` [n, H, W]. In eval `model(images)` gives for each image `boxes` in its
    own pixels, `labels`, `scores` and, for Mask R-CNN, `masks` [n, M, M]: probabilities inside the boxes, see `paste`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        taps: Taps,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str],
        cfg: DetectionModel,
    ) -> None:
        super().__init__()
        self.encoder, self.taps, self.classes, self.cfg = encoder, taps, list(classes), cfg
        if cfg.window is not None:
            use_windows(encoder, taps, cfg.window)
        self.pyramid = Pyramid(taps, cfg.strides, cfg.channels)
        square = -(-cfg.size // self.pyramid.unit) * self.pyramid.unit
        self.detector = build_detector(cfg, _Maps(self.maps, cfg.channels), len(classes), self.pyramid.strides, square)
        self.detector.transform = Canvas(Normalise(mean, std), cfg.size, square)
        self.drawn = 0.5
        """least score of what `draw` shows"""
        self.first = 1 if cfg.kind.endswith("rcnn") else 0
        """torchvision's number of the first class: the two-stage kinds have a background at 0"""
        _freeze_unread(self, len(mean), square)

    def forward(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None) -> Any:
        """uint8 [C, H, W] of any sizes -> losses, or predictions."""
        if self.training:
            assert targets is not None
            numbered = [{**target, "labels": target["labels"] + self.first} for target in targets]
            return self.detector(list(images), numbered)
        found = self.detector(list(images))
        return [{**each, "labels": each["labels"] - self.first} for each in found]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Normalised [B, C, H, W] -> the levels of the pyramid, float32."""
        tokens = dense_maps(self.encoder, show(images, self.pyramid.shown), self.taps)
        levels: list[Tensor] = convert_to_fp32(self.pyramid(tokens))
        return levels

    @torch.inference_mode()
    def predict(self, image: Tensor) -> dict[str, Any]:
        """uint8 [C, H, W] -> `boxes` [n, 4] x1, y1, x2, y2, `labels`, `names`, `scores`, best first, and for Mask
        R-CNN `masks` bool [n, H, W]."""
        device = next(self.parameters()).device
        found = {name: value.cpu() for name, value in self([image.to(device)])[0].items()}
        if "masks" in found:
            found["masks"] = paste(found["masks"], found["boxes"], (image.shape[1], image.shape[2]))
        return {**found, "names": [self.classes[label] for label in found["labels"].tolist()]}

    def draw(self, image: Tensor, found: dict[str, Any], least: float | None = None) -> Tensor:
        """uint8 [3, h, w]: the image, enlarged if it is small, with what has a score of `least` (null: `drawn`).

        Where boxes overlap by more than half, whatever their classes, only the surest is drawn: else nobody sees them.
        """
        order = nms(found["boxes"], found["scores"], 0.5)
        shown = order[found["scores"][order] >= (self.drawn if least is None else least)]
        masks = found["masks"][shown] if "masks" in found else None
        return draw_objects(
            image, found["boxes"][shown], found["labels"][shown], self.classes, found["scores"][shown], masks
        )


class Canvas(nn.Module):
    """torchvision's `transform`: uint8 images, normalised, in a square; and boxes back into pixels of the images."""

    def __init__(self, normalise: Normalise, size: int, square: int) -> None:
        super().__init__()
        self.normalise, self.size, self.square = normalise, size, square

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Training images fit already, see `augment`; others are resized. Padding is the mean colour."""
        page = images[0].new_zeros((len(images), images[0].shape[0], self.square, self.square), dtype=torch.float32)
        sizes = []
        for row, image in zip(page, images, strict=True):
            if not self.training:
                wanted = fitted(image.shape[1], image.shape[2], self.size)
                # uint8 can be resized on a CPU only
                image = resize(image if image.device.type == "cpu" else image.float(), wanted)
            height, width = image.shape[-2:]
            row[:, :height, :width] = self.normalise(image)
            sizes.append((height, width))
        return ImageList(page, sizes), targets

    def postprocess(
        self, found: list[dict[str, Tensor]], sizes: list[tuple[int, int]], originals: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Boxes in pixels of the original images; masks stay as they are in their boxes, [n, M, M]."""
        if self.training:
            return found
        for each, size, original in zip(found, sizes, originals, strict=True):
            ratio = [original[1] / size[1], original[0] / size[0]]
            each["boxes"] = each["boxes"] * each["boxes"].new_tensor(ratio * 2)
            if "masks" in each:
                each["masks"] = each["masks"][:, 0]
        return found


class _Maps(nn.Module):
    """The backbone as torchvision wants it, without parameters of its own: a second registration would double keys."""

    def __init__(self, maps: Callable[[Tensor], list[Tensor]], channels: int) -> None:
        super().__init__()
        self.maps, self.out_channels = maps, channels  # a bound method follows its module in `copy.deepcopy`

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return OrderedDict((str(i), level) for i, level in enumerate(self.maps(images)))


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes into their image: probabilities [n, M, M], boxes [n, 4] -> bool [n, H, W].

    torchvision's RoIAlign takes coordinate x for the middle of pixel x, so a mask lies half a pixel to the left and
    above of its box; here it is put back.
    """
    height, width = size
    x1, y1, x2, y2 = (boxes[:, i : i + 1] for i in range(4))
    x = torch.arange(width, device=boxes.device)
    y = torch.arange(height, device=boxes.device)
    across, down = 2 * (x - x1) / (x2 - x1) - 1, 2 * (y - y1) / (y2 - y1) - 1  # [n, W], [n, H]
    inside = ((y + 0.5 > y1) & (y + 0.5 < y2))[:, :, None] & ((x + 0.5 > x1) & (x + 0.5 < x2))[:, None]
    out = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    rows = max(1, (1 << 24) // (height * width))  # of a grid of 128 MB
    for begin in range(0, len(masks), rows):
        part = slice(begin, begin + rows)
        grid = torch.stack(
            [across[part, None].expand(-1, height, -1), down[part, :, None].expand(-1, -1, width)], dim=-1
        )
        values = nn.functional.grid_sample(
            masks[part, None].float(), grid.float(), padding_mode="border", align_corners=False
        )
        out[part] = (values[:, 0] > 0.5) & inside[part]
    return out


def _freeze_unread(detector: Detector, channels: int, square: int) -> None:
    """Parameters of the encoder that no map depends on, e.g. a norm of pooled features, are not trained.

    DistributedDataParallel would wait for their gradients. Found on tensors without memory.
    """
    if torch.is_inference_mode_enabled():  # a model that is loaded to predict: its parameters can get no gradient
        return
    ghost = copy.deepcopy(detector).eval().to("meta")
    named = {name: parameter for name, parameter in ghost.encoder.named_parameters() if parameter.requires_grad}
    if not named:
        return
    with torch.enable_grad():  # also below no_grad
        levels = ghost.maps(torch.empty(1, channels, square, square, device="meta"))
        total = torch.stack([level.sum() for level in levels]).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is None:
            detector.encoder.get_parameter(name).requires_grad_(False)
