"""The recipe of semantic segmentation; defaults are those of MAE's and BEiT's ADE20K fine-tuning where they exist."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...data.settings import JitterSettings, Share
from ...optim import ClipSettings, OptimizerSettings
from ...settings import Settings
from ..settings import FinetuneRecipe


class SegmentationData(Settings):
    """Images and their label maps, whose pixels are class ids."""

    source: str = ""
    """a folder in one of the layouts below, a Hub data set, parquet files or a `save_to_disk` folder; the command
    line's --data"""
    layout: Literal["auto", "folders", "ade20k", "voc", "cityscapes", "table"] = "auto"
    """`folders`: {train,val}/ and masks/{train,val}/, or images/{train,val}/ with masks/, annotations/ or labels/;
    `table`: two image columns. `auto`: what is found, which is said"""
    train_split: str = "train"
    test_split: str = "val"
    image: str | None = None
    """table: column of the images; null: the first image column"""
    mask: str | None = None
    """table: column of the label maps; null: the second image column"""
    config: str | None = None
    """configuration name of a Hub data set"""
    revision: str | None = None
    """commit hash of a Hub data set"""
    classes: list[str] | str | None = None
    """names in the order of their ids, or a file of them: .txt with one a line, .json with a list or {id: name}; null:
    `classes.txt` or `classes.json` in the folder, what the layout knows, else the ids that all training masks have"""
    ignore: list[int] | None = None
    """ids of pixels that are neither trained nor measured; null: as the layout has it, [255] or ADE20K's [0, 255].
    Classes given as a list have the ids 0, 1, 2, ... without these"""
    channels: int = Field(3, ge=1, le=512)
    value_range: list[float] | None = Field(None, min_length=2, max_length=2)
    """[low, high] that is mapped to 0..255; null: the full range of the integer type"""
    max_megapixels: float = Field(64, gt=0)
    limit: int | None = Field(None, ge=1)
    """train on only that many images"""
    checked: int = Field(2000, ge=0)
    """masks of each split that are read before the run (all, where classes have to be found); the others are judged
    when their turn comes"""

    @model_validator(mode="after")
    def _check(self) -> SegmentationData:
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be [low, high] with low < high, got {self.value_range}")
        if isinstance(self.classes, list) and len(set(self.classes)) < max(2, len(self.classes)):
            raise ValueError(f"classes must be two or more different names, got {self.classes}")
        return self


class SegmentationModel(Settings):
    """The head."""

    head: Literal["linear", "upernet"] = "upernet"
    """`linear`: BatchNorm and a 1x1 convolution (DINOv2); `upernet`: pyramid pooling and a feature pyramid over four
    maps"""
    maps: Literal["last", "all"] = "last"
    """what the linear head reads: the last map, or all side by side at the finest one's resolution (DINOv2's four
    layers; of a Swin, whose last map is coarse, the stages). UPerNet reads all"""
    channels: int = Field(512, ge=16)
    """width of UPerNet"""
    norm: Literal["batch", "group"] = "batch"
    """UPerNet's. `batch`: over all processes' images of a forward pass, as published; `group`: nothing depends on the
    batch or its division, for forward passes of one or two images; it learns more slowly"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """of whole channels before the classifier"""
    auxiliary: float = Field(0.4, ge=0)
    """weight of a small convolutional head's loss on the third map, which predictions do not use; 0: none. Not for
    the linear head"""
    auxiliary_channels: int = Field(256, ge=16)


class SegmentationAugment(Settings):
    """Training crops: resize, crop, flip, jitter, as in mmsegmentation's ADE20K pipeline."""

    size: int | list[int] = 512
    """of the crop in pixels: side, or [height, width]"""
    short_side: int | None = Field(None, ge=1)
    """the image's short side before `scale`; null: as it is"""
    scale: list[float] = Field([0.5, 2.0], min_length=2, max_length=2)
    """enlargement, [low, high]"""
    cat_max_ratio: float = Field(0.75, gt=0, le=1)
    """a crop in which one class has a larger share of the labelled pixels is drawn again, ten times at most"""
    hflip: Share = 0.5
    vflip: Share = 0.0
    jitter: JitterSettings | None = JitterSettings(p=0.5, brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05)
    """strengths of mmsegmentation's PhotoMetricDistortion; there each of the four has its own probability of 0.5"""

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @model_validator(mode="after")
    def _check(self) -> SegmentationAugment:
        sides = [self.size] if isinstance(self.size, int) else self.size
        if not 1 <= len(sides) <= 2 or min(sides) < 8:
            raise ValueError(f"size is a side of 8 pixels or more, or [height, width], got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < low <= high, got {self.scale}")
        return self


class SegmentationTest(Settings):
    """How whole images are predicted; every number is measured at the mask's own size."""

    mode: Literal["whole", "slide"] = "whole"
    """`slide`: windows of `crop` at every `stride`, whose scores are averaged where they overlap"""
    crop: int | list[int] | None = None
    """side of a window, or [height, width]; null: the training crop's"""
    stride: int | list[int] | None = None
    """null: two thirds of the window (512 and 341 in the papers)"""
    short_side: int | None = Field(None, ge=1)
    """resize images to it before predicting; null: as in training"""

    @model_validator(mode="after")
    def _check(self) -> SegmentationTest:
        for name, value in (("crop", self.crop), ("stride", self.stride)):
            sides = [value] if isinstance(value, int) else value or [1]
            if len(sides) > 2 or min(sides) < 1:
                raise ValueError(f"{name} is a number of pixels, or [height, width], got {value}")
        return self


class SegmentationRecipe(FinetuneRecipe):
    """Everything that decides a fine-tuning for semantic segmentation."""

    data: SegmentationData = SegmentationData()
    model: SegmentationModel = SegmentationModel()
    augment: SegmentationAugment = SegmentationAugment()
    test: SegmentationTest = SegmentationTest()
    optimizer: OptimizerSettings = OptimizerSettings(
        lr=1e-4, lr_per=16, warmup="5%", layer_decay=0.75, weight_decay=0.05, clip=ClipSettings(norm=3.0)
    )
