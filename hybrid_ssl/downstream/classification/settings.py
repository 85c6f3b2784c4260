"""The recipe of a fine-tuned classifier: MAE's (arXiv 2111.06377) and BEiT's (2106.08254) augmentation and head."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from ...data.settings import Share
from ...settings import Settings
from ..settings import FinetuneRecipe


class LabelledData(Settings):
    """Images with one label each: class folders, a list with labels, tables, Hub data sets, tar shards."""

    source: str | list[str] = ""
    """in any form that pretraining takes; the command line's --data"""
    split: str = "train"
    test_source: str | list[str] | None = None
    """null: a split of `source`"""
    test_split: str | None = None
    """null: the first that there is of val, validation, valid, test"""
    hold_out: float = Field(0.0, ge=0, lt=1)
    """share of the training images that become the test set, where there is no other"""
    config: str | None = None
    """configuration name of a Hugging Face data set"""
    revision: str | None = None
    """commit hash of a Hub data set"""
    image: str | None = None
    """column of the image; null: the first image column"""
    label: str | None = None
    """column of the label; null: `label`. Class folders give labels by themselves"""
    limit: int | None = Field(None, ge=1)
    """train on only that many images, drawn for all runs alike"""
    test_limit: int | None = Field(None, ge=1)
    channels: int | None = Field(None, ge=1, le=512)
    """null: as many as the encoder reads; other numbers adapt its first layer"""
    value_range: list[float] | None = Field(None, min_length=2, max_length=2)
    """[low, high] that is mapped to 0..255; null: the full range of the integer type"""
    max_megapixels: float = Field(64, gt=0)

    @model_validator(mode="after")
    def _check_range(self) -> LabelledData:
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be [low, high] with low < high, got {self.value_range}")
        return self


class ClassificationData(LabelledData):
    """Labelled images at the size of a fine-tuning."""

    size: int | list[int] = 224
    """pixels: side, or [height, width]"""
    crop: float = Field(0.875, gt=0, le=1)
    """share of the side that is tested: the centre (224 of 256)"""

    @property
    def height_width(self) -> tuple[int, int]:
        return two_sides(self.size)

    @field_validator("size")
    @classmethod
    def _sides(cls, size: int | list[int]) -> int | list[int]:
        two_sides(size)
        return size


def two_sides(size: int | list[int]) -> tuple[int, int]:
    """Height and width; ValueError for what is no size of images."""
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or not 1 <= min(sides) <= max(sides) <= 8192:
        raise ValueError(f"{size!r} is no size: give one number of pixels, or [height, width], up to 8192")
    return sides[0], sides[1]


class AugmentSettings(Settings):
    """What is done to a training image."""

    scale: list[float] = Field([0.08, 1.0], min_length=2, max_length=2)
    """share of the image's area that is cropped, [low, high]"""
    ratio: list[float] = Field([0.75, 1.3333333333333333], min_length=2, max_length=2)
    """width over height, [low, high]"""
    hflip: Share = 0.5
    vflip: Share = 0.0
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """in timm's words: m strength of 10, mstd its spread, n operations, inc1 stronger with m; null: none. Images that
    have neither 1 nor 3 channels are only moved, turned and sheared"""
    erase: Share = 0.25
    """probability that a rectangle is replaced by noise"""


class MixSettings(Settings):
    """Two images of a batch become one, with both labels."""

    mixup: float = Field(0.8, ge=0)
    """alpha of Beta(alpha, alpha), from which the share is drawn (arXiv 1710.09412); 0: off"""
    cutmix: float = Field(1.0, ge=0)
    """the same for rectangles (arXiv 1905.04899); 0: off"""
    p: Share = 1.0
    """probability that a batch is mixed at all"""
    switch: Share = 0.5
    """probability of cutmix where both are on"""


class HeadSettings(Settings):
    """What is read from the encoder."""

    pool: Literal["avg", "token"] | None = None
    """of a ViT: `avg`: mean of the patches with a new norm behind it, instead of the encoder's (MAE); `token`: the
    class token; null: as the encoder was exported"""
    std: float = Field(2e-5, ge=0)
    """of the new head's weights (MAE, BEiT): its first answers are all alike"""


class ClassifierExport(Settings):
    """The classifier that leaves the run, as timm and transformers load it."""

    licence: str = "other"
    """licence identifier written on the card; trained weights belong to whoever trained them"""
    verify: bool = True
    """load it in a fresh process with timm (and transformers, if installed) and compare outputs"""


class ClassificationRecipe(FinetuneRecipe):
    """Everything that decides the fine-tuning of a classifier."""

    data: ClassificationData = ClassificationData()
    augment: AugmentSettings = AugmentSettings()
    mix: MixSettings = MixSettings()
    head: HeadSettings = HeadSettings()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    export: ClassifierExport = ClassifierExport()
