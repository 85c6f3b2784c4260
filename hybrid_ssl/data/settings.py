"""The recipe sections `data`, `views` and `masks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..schedule import Duration
from ..settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]
PerCrop = Share | list[Share]
"""one probability for every crop of the group, or a list with one a crop"""


class ProbeSettings(Settings):
    """Labelled images that the k-NN probe looks at while training."""

    source: str | list[str] | None = None
    """labelled training images of the probe, in any form `data.source` takes; null: the labels of `data.source`"""
    split: str = "train"
    test_source: str | list[str] | None = None
    """labelled test images; null: `test_split` of the same source"""
    test_split: str = "test"
    image: str | None = None
    label: str | None = None
    train_images: int = Field(10_000, ge=1)
    """how many training images the probe reads at most"""
    test_images: int = Field(2_000, ge=1)
    size: int | list[int] | None = None
    """side in pixels; null: the size of the first view"""


class ModalitySettings(Settings):
    """Something else that is known of every pixel of an image, e.g. depth or a label map: where it is from."""

    column: str | None = None
    """a column of the data set"""
    source: str | list[str] | None = None
    """folders of pictures that are called like the images, up to the ending"""
    derive: Literal["gray", "sobel", "levels"] | None = None
    """computed from the image: brightness, strength of edges, or brightness in `classes` steps as a label map"""
    channels: int = Field(1, ge=1, le=512)
    classes: int | None = Field(None, ge=2, le=32_000)
    """a label map with ids 0 .. classes - 1; null: continuous values, floats or integers that are scaled to 0..1"""
    unlabelled: int | None = None
    """id of pixels without label, often 255"""
    standardise: bool = True
    """continuous: each crop is standardised by mean and deviation of its middle 80 % of values"""

    @model_validator(mode="after")
    def _check(self) -> ModalitySettings:
        if sum(origin is not None for origin in (self.column, self.source, self.derive)) != 1:
            raise ValueError("a modality is from one of: a `column` of the data set, a `source` folder, `derive`")
        if (self.derive == "levels") != (self.derive is not None and self.classes is not None):
            raise ValueError("derive: levels needs `classes`, the number of steps; gray and sobel have none")
        if self.derive is not None and self.channels != 1:
            raise ValueError(f"derive: {self.derive} gives one channel, got channels: {self.channels}")
        return self


class DataSettings(Settings):
    """Where images come from. Labels are optional everywhere."""

    source: str | list[str]
    """a folder (recursive), a list of folders, a .txt list of files, a Hub data set name, parquet / arrow files, a
    `save_to_disk` folder, .tar shards, or `embedded:fashion_mnist`, a small labelled set in the package"""
    split: str = "train"
    """split of a Hugging Face data set, or of a folder whose sub-folders are called train, val, test"""
    config: str | None = None
    """configuration name of a Hugging Face data set"""
    revision: str | None = None
    """commit hash of a Hub data set"""
    image: str | None = None
    """column of the image; null: the first image column"""
    label: str | None = None
    """column of the label; null: `label` if there is one. Class folders give labels by themselves"""
    streaming: bool = False
    """read shards in sequence: nothing is downloaded or indexed first, but a resume walks the epoch's shards again and
    needs the same number of processes"""
    channels: int = Field(3, ge=1, le=512)
    """channels of the images; gray is repeated to 3 where 3 are asked for, other mismatches are refused"""
    value_range: list[float] | None = Field(None, min_length=2, max_length=2)
    """[low, high] that is mapped to 0..255; null: the full range of the integer type; float images need it"""
    mean: Literal["imagenet", "auto"] | list[float] = "imagenet"
    """per channel in 0..1; `auto`: measured from the data"""
    std: Literal["imagenet", "auto"] | list[float] = "imagenet"
    limit: int | None = Field(None, ge=1)
    """use only that many images; with `streaming` the number that counts as one epoch"""
    jitter: Literal["fast", "exact"] = "fast"
    """`fast`: colour jitter as one 3x4 matrix; `exact`: torchvision's sequence with clamping in between"""
    max_megapixels: float = Field(64, gt=0)
    """larger images count as broken (a 20 kB PNG can unpack to gigabytes)"""
    max_broken: Share = 0.01
    """the run stops when a larger share of the images is broken"""
    modalities: dict[str, ModalitySettings] = {}
    """name -> what else is known of each pixel; views show it by `modality`"""
    probe: ProbeSettings | None = None

    @model_validator(mode="after")
    def _check_range(self) -> DataSettings:
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be [low, high] with low < high, got {self.value_range}")
        return self


class JitterSettings(Settings):
    """torchvision's ColorJitter, applied with probability `p`."""

    p: PerCrop = 0.8
    brightness: float = Field(0.4, ge=0)
    contrast: float = Field(0.4, ge=0)
    saturation: float = Field(0.2, ge=0)
    hue: float = Field(0.1, ge=0, le=0.5)


class CorruptSettings(Settings):
    """Rectangles of pixels that are lost or come from another image (GMML); see `corrupt.py`."""

    lost: float = Field(0.5, gt=0, lt=1)
    """share of the pixels that are painted over"""
    fill: list[int] | None = None
    """what they are painted with, a value of 0 to 255 for each channel; null: the mean colour of the crop"""
    replace: Share = 0.5
    """probability that pixels of another image are pasted into the crops of an image, instead of paint"""
    replaced: float = Field(0.3, gt=0, lt=1)
    """share of the pixels that are, then"""
    largest: float = Field(0.3, gt=0, le=1)
    """longest side of a rectangle over that of the crop"""
    align: int = Field(1, ge=1)
    """corners lie on a grid of that many pixels; the encoder's patch size: whole patches are corrupted"""


class ViewSettings(Settings):
    """A group of crops of equal size. Order: crop, flip, turn, shift, jitter, gray, blur, solarize, defect."""

    size: int | list[int] = 224
    """pixels: side, or [height, width]"""
    crops: int = Field(1, ge=1, le=100)
    crop: Literal["random", "center"] = "random"
    """`random`: random resized crop; `center`: resize the short side and cut the centre"""
    scale: list[float] = Field([0.2, 1.0], min_length=2, max_length=2)
    """share of the image's area, [low, high]"""
    ratio: list[float] = Field([0.75, 1.3333333333333333], min_length=2, max_length=2)
    """width over height, [low, high]"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    hflip: Share = 0.5
    vflip: Share = 0.0
    jitter: JitterSettings | None = None
    gray: PerCrop = 0.0
    blur: PerCrop = 0.0
    blur_sigma: list[float] = Field([0.1, 2.0], min_length=2, max_length=2)
    """Gaussian sigma in pixels, [low, high]"""
    solarize: PerCrop = 0.0
    solarize_threshold: float = Field(0.5, ge=0, le=1)
    like: str | None = None
    """another view whose boxes and flips are used, at this view's size (a tokenizer's smaller picture)"""
    shift: int = Field(0, ge=0)
    """resize the boxes to this many pixels more than `size`, and take a window of `size` out of them: the top left one,
    or with `like` one that is 0 to shift - 1 pixels further down and to the right (CMAE: 32)"""
    modality: str | None = None
    """one of `data.modalities`, cut like the view that this one is `like`; a smaller size gives smaller patches"""
    turns: bool = False
    """all crops are one square, crop k turned by k x 90 degrees (rotation)"""
    cutpaste: list[Literal["none", "patch", "scar"]] | None = None
    """all crops have one box, and crop k gets the k-th defect planted; see `cutpaste.py`"""
    corrupt: CorruptSettings | None = None
    """take the finished crops of the view that this one is `like`, and corrupt them; the batch then has a mask
    `NAME.pixels` that says where"""

    @property
    def one_box(self) -> bool:
        """Whether all crops show the same part of the image."""
        return self.turns or self.cutpaste is not None

    @property
    def made(self) -> frozenset[str]:
        """What is done to the crops that an objective may rely on, in the words of the settings."""
        gray = self.gray in (1, [1] * self.crops)
        made = {"turns": self.turns, "cutpaste": self.cutpaste, "corrupt": self.corrupt, "gray": gray}
        done = frozenset(name for name, done in made.items() if done)
        return done if self.like is None else done | {f"like={self.like}"}

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @model_validator(mode="after")
    def _check(self) -> ViewSettings:
        if isinstance(self.size, list) and len(self.size) != 2:
            raise ValueError(f"size is [height, width], got {self.size}")
        if not 1 <= min(self.height_width) <= max(self.height_width) <= 8192:
            raise ValueError(f"size must be from 1 to 8192 pixels, got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"blur_sigma must be 0 < low <= high, got {self.blur_sigma}")
        if self.turns and (self.height_width[0] != self.height_width[1] or self.crops > 4 or self.vflip):
            raise ValueError(
                f"turns: true makes up to 4 crops of a square, without vflip (a flip and a half turn look alike); got "
                f"crops {self.crops}, size {self.size}, vflip {self.vflip}"
            )
        if self.cutpaste is not None and (len(set(self.cutpaste)) != self.crops or len(self.cutpaste) != self.crops):
            raise ValueError(f"cutpaste names a different defect for each of {self.crops} crops, got {self.cutpaste}")
        if self.modality is not None and self.like is None:
            raise ValueError(f"a view of modality {self.modality} is cut like one of the images: set `like`")
        if self.modality is not None and (self.jitter or self.gray or self.blur or self.solarize or self.one_box):
            raise ValueError(f"jitter, gray, blur, solarize and cutpaste are for images, not for {self.modality}")
        if self.corrupt is not None:
            side, align = min(self.height_width), self.corrupt.align
            if any(n % align for n in self.height_width) or align > self.corrupt.largest * side:
                raise ValueError(
                    f"corrupt.align {align} has to divide the sides {self.size} and be at most corrupt.largest "
                    f"{self.corrupt.largest} x {side} pixels"
                )
            if self.like is None:
                raise ValueError("corrupt needs the clean view beside it: name that view in `like`")
        per_crop = {"gray": self.gray, "blur": self.blur, "solarize": self.solarize}
        if self.jitter:
            per_crop["jitter.p"] = self.jitter.p
        for name, value in per_crop.items():
            if isinstance(value, list) and len(value) != self.crops:
                raise ValueError(f"{name} lists {len(value)} probabilities for {self.crops} crops")
        return self


def shown(views: Iterable[str | None], settings: Mapping[str, ModalitySettings]) -> dict[str, ModalitySettings]:
    """The settings of the modalities that views name; ValueError for one that is not there."""
    names = dict.fromkeys(name for name in views if name is not None)
    for name in names:
        if name not in settings:
            known = ", ".join(settings) or "none"
            raise ValueError(
                f"a view shows modality {name!r}; data.modalities has: {known}. For example "
                f"data.modalities.{name}={{column: {name}}}"
            )
    return {name: settings[name] for name in names}


class RandomMask(Settings):
    """Uniformly random units, the same number in every crop (MAE, SimMIM)."""

    kind: Literal["random"]
    view: str
    ratio: float = Field(gt=0, lt=1)
    """share hidden; ceil(ratio x units) units are"""
    unit: int | None = Field(None, ge=1)
    """side of a unit in pixels, a multiple of the encoder's stride; null: one token"""


class BlockMask(Settings):
    """BEiT's blocks: rectangles of random area and aspect until the target is reached (iBOT, BEiT)."""

    kind: Literal["block"]
    view: str
    ratio: list[float] = Field([0.1, 0.5], min_length=2, max_length=2)
    """[low, high]: the target share is drawn uniformly for each crop"""
    p: Share = 1.0
    """probability that a crop is masked at all (iBOT: 0.5)"""
    stratified: bool = False
    """false: every crop draws by itself whether and how much is hidden; true: of all crops of an optimizer step exactly
    the share `p` is masked, one with each of as many equal steps of `ratio` (DINOv2, there in each micro-batch)"""
    min_tokens: int = Field(4, ge=1)
    """area of the smallest block (iBOT: (grid // 3) ** 2, BEiT: 16)"""
    max_tokens: int | None = Field(None, ge=1)
    """area of the largest block; null: what is still missing"""
    aspect: list[float] = Field([0.3, 3.3333333333333335], min_length=2, max_length=2)
    unit: int | None = Field(None, ge=1)
    start: Duration = "0 steps"
    """duration before which nothing is hidden (iBOT on Swin: 50 epochs)"""

    @model_validator(mode="after")
    def _check(self) -> BlockMask:
        if not 0 < self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError(f"ratio must be 0 < low <= high < 1, got {self.ratio}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect must be 0 < low <= high, got {self.aspect}")
        return self


class MultiBlockMask(Settings):
    """I-JEPA's blocks. Hides all but the context; the targets to predict come as a second mask `NAME.targets`."""

    kind: Literal["multiblock"]
    view: str
    targets: int = Field(4, ge=1)
    """T, number of blocks to be predicted"""
    target_scale: list[float] = Field([0.15, 0.2], min_length=2, max_length=2)
    """share of the tokens in one target, [low, high]"""
    target_aspect: list[float] = Field([0.75, 1.5], min_length=2, max_length=2)
    """height over width of a target, [low, high]"""
    context_scale: list[float] = Field([0.85, 1.0], min_length=2, max_length=2)
    """share of the tokens in the block that the context is taken from, [low, high]"""
    visible: float = Field(0.25, gt=0, lt=1)
    """share of the tokens that the context keeps, the same number in every crop"""

    @model_validator(mode="after")
    def _check(self) -> MultiBlockMask:
        for name in ("target_scale", "target_aspect", "context_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name.endswith("scale") and high > 1):
                raise ValueError(f"{name} must be 0 < low <= high{' <= 1' * ('scale' in name)}, got {[low, high]}")
        return self


class DirichletMask(Settings):
    """MultiMAE's: random tokens of several modalities, whose shares are drawn for each crop."""

    kind: Literal["dirichlet"]
    view: str
    beside: list[str]
    """the views of other modalities, in the order of their tokens; they are `like` that view"""
    ratio: float = Field(gt=0, lt=1)
    """share of all tokens that is hidden; ceil(ratio x tokens) are"""
    alpha: float = Field(1.0, ge=0.1, le=1000)
    """1: every division is equally likely; smaller: mostly one modality is seen; larger: as much of each"""


MaskSettings = Annotated[RandomMask | BlockMask | MultiBlockMask | DirichletMask, Field(discriminator="kind")]
