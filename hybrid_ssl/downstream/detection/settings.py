"""The recipe of detection and instance segmentation; its defaults are those of ViTDet and of torchvision's detectors.

Sources: ViTDet (arXiv 2203.16527), Mask R-CNN (arXiv 1703.06870), RetinaNet (arXiv 1708.02002), FCOS (arXiv
1904.01355), large-scale jitter (arXiv 2012.07177).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...data.settings import Share
from ...optim import ClipSettings, OptimizerSettings
from ...settings import Settings
from ..settings import FinetuneRecipe


class DetectionData(Settings):
    """Images with boxes, and masks if there are some, in COCO's JSON format."""

    source: str = ""
    """a folder with annotations/instances_train.json and instances_val.json (or ...train2017.json), or with
    train/_annotations.coco.json and valid/...; the command line's --data"""
    train: str | None = None
    """training annotations, in `source`; null: found"""
    val: str | None = None
    """annotations that are tested on, in `source`; null: found"""
    train_images: str | None = None
    """folder of the training images, in `source`; null: found"""
    val_images: str | None = None
    empty_images: bool = True
    """also train on images without any object; ViTDet leaves them out"""
    limit: int | None = Field(None, ge=1)
    """train on only that many images"""
    value_range: list[float] | None = Field(None, min_length=2, max_length=2)
    """[low, high] that is mapped to 0..255; null: the full range of the integer type. Channels are the encoder's"""
    max_megapixels: float = Field(64, gt=0)


class RcnnSettings(Settings):
    """The two stages of Faster and Mask R-CNN; other kinds do not have them. Defaults: torchvision's."""

    rpn_convs: int = Field(1, ge=1)
    """3x3 convolutions before the region proposals' output; ViTDet: 2"""
    rpn_sampled: int = Field(256, ge=1)
    """anchors of an image that the proposals' loss sees"""
    candidates: list[int] = Field([2000, 1000], min_length=2, max_length=2)
    """best-scored anchors of a level that are looked at, [training, test]"""
    proposals: list[int] = Field([2000, 1000], min_length=2, max_length=2)
    """boxes of an image that go to the second stage, [training, test]; ViTDet: [1000, 1000]"""
    sampled: int = Field(512, ge=1)
    """proposals of an image that the second stage is trained on, a quarter of them on objects"""
    box_convs: int = Field(0, ge=0)
    """3x3 convolutions with LayerNorm in the box head, before one layer; 0: two layers instead; ViTDet: 4"""
    box_dim: int = Field(1024, ge=1)
    mask_convs: int = Field(4, ge=1)
    mask_channels: int = Field(256, ge=1)


class DetectionModel(Settings):
    """The detector around the encoder."""

    kind: Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos"] = "mask_rcnn"
    size: int = Field(1024, ge=16)
    """images are resized to fit into a square of this side, which is the same for all: predictions do not depend on
    what else is in the batch"""
    strides: list[int] | None = None
    """pixels of a cell at each level of the pyramid, doubling; one more is added by pooling. null: [4, 8, 16, 32] for
    a ViT (ViTDet), a Swin's own stages"""
    channels: int = Field(256, ge=8)
    """width of the pyramid and of dense heads"""
    window: int | None = Field(None, ge=1)
    """a ViT's tokens attend within squares of this side, except in the last block of each quarter; ViTDet: 14. It is
    much cheaper for large images. null: attention is global everywhere"""
    anchors: list[list[float]] | None = None
    """sides of the anchors at each level, pooled one included; null: 8 x stride, RetinaNet 4 x stride in three sizes.
    FCOS has none"""
    ratios: list[float] = Field([0.5, 1.0, 2.0], min_length=1)
    """heights over widths of the anchors"""
    rcnn: RcnnSettings = RcnnSettings()
    convs: int = Field(4, ge=1)
    """convolutions of the two heads of FCOS; RetinaNet has 4"""
    score: Share = 0.05
    """predictions with a lower score are dropped"""
    overlap: Share = 0.5
    """of two predictions of a class that overlap more, the better one stays"""
    detections: int = Field(100, ge=1)
    """predictions of an image at most"""

    @model_validator(mode="after")
    def _check(self) -> DetectionModel:
        strides = self.strides or [4, 8, 16, 32]
        if any(s < 1 or s & (s - 1) for s in strides) or strides != [strides[0] << i for i in range(len(strides))]:
            raise ValueError(f"strides {self.strides}: powers of two are wanted, each twice the one before")
        if self.anchors is not None and any(not sides or min(sides) <= 0 for sides in self.anchors):
            raise ValueError("anchors: at least one positive side is wanted for every level")
        if min(self.ratios) <= 0:
            raise ValueError(f"ratios must be positive, got {self.ratios}")
        if self.kind == "fcos" and self.channels % 32:
            raise ValueError(f"channels {self.channels}: FCOS normalises in 32 groups, so it needs a multiple of 32")
        return self


class DetectionAugment(Settings):
    """How training images are changed."""

    hflip: Share = 0.5
    scale: list[float] = Field([0.1, 2.0], min_length=2, max_length=2)
    """large-scale jitter: the image is resized to fit into `model.size` times a factor from this range, then a random
    part of `model.size` is cut; [1.0, 1.0]: whole images, as in testing"""

    @model_validator(mode="after")
    def _check(self) -> DetectionAugment:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < low <= high, got {self.scale}")
        return self


class DetectionRecipe(FinetuneRecipe):
    """Everything that decides a fine-tuning for detection."""

    data: DetectionData = DetectionData()
    model: DetectionModel = DetectionModel()
    augment: DetectionAugment = DetectionAugment()
    optimizer: OptimizerSettings = OptimizerSettings(
        lr=1e-4, lr_per=64, warmup="1%", layer_decay=0.7, weight_decay=0.1, clip=ClipSettings(norm=1.0)
    )
