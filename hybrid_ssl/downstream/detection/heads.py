"""torchvision's detectors with heads of any width, on a pyramid whose strides are known.

Shapes: B images; a level is [B, F, h, w]; K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from .settings import DetectionModel

_BOX_CELLS, _MASK_CELLS = 7, 14  # Mask R-CNN


class Anchors(AnchorGenerator):
    """Anchors in the middle of cells of known strides, float32 whatever the features are."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, images: ImageList, levels: list[Tensor]) -> list[Tensor]:
        device = levels[0].device
        every = []
        for level, stride, cell in zip(levels, self.strides, self.cell_anchors, strict=True):
            y, x = ((torch.arange(side, device=device) + 0.5) * stride for side in level.shape[-2:])
            down, across = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([across, down, across, down], dim=-1)  # [h, w, 4]
            every.append((centres[:, :, None] + cell.to(device)).reshape(-1, 4))
        return [torch.cat(every)] * len(images.image_sizes)


class RoiPool(MultiScaleRoIAlign):
    """torchvision's, for levels of a square of known size: it would guess their scale from the first batch's images."""

    def __init__(self, levels: int, cells: int, square: int) -> None:
        super().__init__([str(i) for i in range(levels)], cells, sampling_ratio=2)
        self.square = square

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        pooled: Tensor = super().forward(x, boxes, [(self.square, self.square)])
        return pooled


def build_detector(cfg: DetectionModel, backbone: nn.Module, classes: int, strides: Sequence[int], square: int) -> Any:
    """The detector of `cfg.kind`; its `transform` is to be replaced.

    Args:
        backbone: [B, C, H, W] -> levels "0", "1", ... of `strides`, the last one pooled.
        classes: without background.
        square: sides of all images.

    Raises:
        ValueError: not as many anchors as levels.
    """
    anchors = Anchors(_sizes(cfg, strides), [1.0] if cfg.kind == "fcos" else cfg.ratios, strides)
    if cfg.kind.endswith("rcnn"):
        detector = _rcnn(cfg, backbone, classes, anchors, len(strides) - 1, square)
        heads = [detector.rpn.head, detector.roi_heads.box_predictor, detector.roi_heads.mask_predictor]
    else:
        detector = _dense(cfg, backbone, classes, anchors)
        heads = [detector.head]
    for head in heads:
        if head is not None:
            head.register_forward_hook(_in_float32)
    return detector


def _rcnn(
    cfg: DetectionModel, backbone: nn.Module, classes: int, anchors: Anchors, levels: int, square: int
) -> FasterRCNN:
    r, width = cfg.rcnn, cfg.channels
    if r.box_convs:
        box_head: nn.Module = FastRCNNConvFCHead(
            (width, _BOX_CELLS, _BOX_CELLS), [width] * r.box_convs, [r.box_dim], norm_layer=LayerNorm2d
        )
    else:
        box_head = TwoMLPHead(width * _BOX_CELLS**2, r.box_dim)
    mask: dict[str, Any] = {}
    if cfg.kind == "mask_rcnn":
        mask = {
            "mask_roi_pool": RoiPool(levels, _MASK_CELLS, square),
            "mask_head": MaskRCNNHeads(width, [r.mask_channels] * r.mask_convs, 1, norm_layer=LayerNorm2d),
            "mask_predictor": MaskRCNNPredictor(r.mask_channels, r.mask_channels, classes + 1),
        }
    return (MaskRCNN if mask else FasterRCNN)(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(width, anchors.num_anchors_per_location()[0], conv_depth=r.rpn_convs),
        rpn_pre_nms_top_n_train=r.candidates[0],
        rpn_pre_nms_top_n_test=r.candidates[1],
        rpn_post_nms_top_n_train=r.proposals[0],
        rpn_post_nms_top_n_test=r.proposals[1],
        rpn_batch_size_per_image=r.rpn_sampled,
        box_roi_pool=RoiPool(levels, _BOX_CELLS, square),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(r.box_dim, classes + 1),
        box_score_thresh=cfg.score,
        box_nms_thresh=cfg.overlap,
        box_detections_per_img=cfg.detections,
        box_batch_size_per_image=r.sampled,
        **mask,
    )


def _dense(cfg: DetectionModel, backbone: nn.Module, classes: int, anchors: Anchors) -> nn.Module:
    thresholds = {"score_thresh": cfg.score, "nms_thresh": cfg.overlap, "detections_per_img": cfg.detections}
    if cfg.kind == "retinanet":
        return RetinaNet(backbone, classes, anchor_generator=anchors, **thresholds)
    head = FCOSHead(cfg.channels, 1, classes, cfg.convs)
    return FCOS(backbone, classes, anchor_generator=anchors, head=head, **thresholds)


def _sizes(cfg: DetectionModel, strides: Sequence[int]) -> list[list[float]]:
    """Sides of the anchors at each level: those of FPN, RetinaNet and FCOS on their strides, unless given."""
    if cfg.kind == "fcos":
        return [[float(stride)] for stride in strides]
    if cfg.anchors is not None:
        if len(cfg.anchors) != len(strides) or len({len(sides) for sides in cfg.anchors}) > 1:
            raise ValueError(
                f"model.anchors: {len(strides)} lists of equal length are wanted, one for each of the strides "
                f"{list(strides)} (the last level is the pooled one), got {cfg.anchors}"
            )
        return cfg.anchors
    if cfg.kind == "retinanet":
        return [[4 * stride * 2 ** (third / 3) for third in range(3)] for stride in strides]
    return [[8.0 * stride] for stride in strides]


def _in_float32(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    """Logits and box offsets of bf16 would also turn anchors, losses and boxes into bf16."""
    return convert_to_fp32(outputs)
