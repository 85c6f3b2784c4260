"""What `hybrid-ssl evaluate` may be told; every default is a paper's, or says why it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ...data.settings import Share
from ...reading import RecipeError, check, read_mapping
from ...settings import Settings
from ..classification.settings import LabelledData, two_sides

Protocol = Literal["knn", "linear", "logistic", "lowshot", "retrieval", "attentive"]
Rate = Annotated[float, Field(gt=0, le=100)]


class EvaluateRun(Settings):
    """Where to, how fast."""

    out: str = Field("runs/evaluate", min_length=1)
    """output folder; every protocol writes `results.json` into a folder of its own below it"""
    cache: str | None = None
    """folder for features, which runs may share; null: `features` in `out`"""
    seed: int = Field(0, ge=0, lt=2**63)
    """of random encoders, of heads and of what is held out"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the encoder; heads are always trained in float32 or more"""
    batch_size: int = Field(64, ge=1)
    """images of one process in a forward pass"""
    workers: int = Field(2, ge=0, le=1024)
    """loader processes of each process"""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads of each process; null: as torch decides"""
    max_broken: float = Field(0.1, ge=0, le=1)
    """share of either split that may be unreadable; those are named and left out. Beyond it is another data set"""


class EvaluateEncoder(Settings):
    """The encoder that is measured; its name is given on the command line."""

    name: str = ""
    """an exported folder, a run's folder, `hf-hub:user/name` or a timm model name; the command line's ENCODER"""
    random: bool = False
    """the same architecture with random weights: what can be had without pretraining"""
    pooling: Literal["own", "cls", "avg"] = "own"
    """`own`: what `encoder(images)` gives; `cls`: the class token; `avg`: the mean of the patch tokens"""


class EvaluateData(LabelledData):
    """Labelled images as in fine-tuning; the encoder says their size."""

    size: int | list[int] | None = None
    """pixels: side, or [height, width]; null: what the encoder was trained at"""
    crop: float | None = Field(None, gt=0, le=1)
    """share of the side that is seen: the centre; null: the encoder's (1 for our exports)"""

    @field_validator("size")
    @classmethod
    def _sides(cls, size: int | list[int] | None) -> int | list[int] | None:
        if size is not None:
            two_sides(size)
        return size


class KnnSettings(Settings):
    """Weighted k-NN, as DINO (arXiv 2104.14294)."""

    k: list[Annotated[int, Field(ge=1)]] = Field([10, 20, 100, 200], min_length=1)
    """numbers of neighbours; those beyond the number of training images are left out"""
    headline: int = 20
    """the k whose accuracy stands for all (DINO: 20 is best)"""
    temperature: float = Field(0.07, gt=0)
    raw_pixels: bool = True
    """also measure the pixels themselves: what an encoder has to beat"""


class SweepSettings(Settings):
    """Linear probe of DINO and DINOv2 (arXiv 2304.07193): many heads on one stream of features."""

    lrs: list[Rate] = Field([1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], min_length=1)
    """for 256 images. DINOv2's end at 0.1; MoCo v3's rate is 3 and MoCo v2's 30, since features differ in length"""
    blocks: list[Annotated[int, Field(ge=1, le=4)]] = Field([1, 4], min_length=1)
    """how many of the last blocks' (Swin: stages') tokens are put side by side"""
    avgpool: list[bool] = Field([False, True], min_length=1)
    """whether the mean of the last patch tokens is put beside them"""
    epochs: int = Field(100, ge=1)
    """DINO: 100; DINOv2: 10 of ImageNet"""
    batch_size: int = Field(256, ge=1)


class MaeProbeSettings(Settings):
    """Linear probe of MAE (arXiv 2111.06377): BatchNorm without affine part in front, LARS, no weight decay."""

    lrs: list[Rate] = Field([0.1, 1.0, 10.0, 100.0], min_length=1)
    """for 256 images. MAE: 0.1 with batches of 16384 for 90 epochs of ImageNet; LARS' steps are relative to the
    weights, so that small data with its few steps needs more"""
    epochs: int = Field(90, ge=1)
    warmup: int = Field(10, ge=0)
    """epochs"""
    batch_size: int = Field(512, ge=2)


class LinearSettings(Settings):
    """Linear probe."""

    kinds: list[Literal["sweep", "mae"]] = Field(["sweep", "mae"], min_length=1)
    """the first one is the headline; their numbers belong into different tables"""
    sweep: SweepSettings = SweepSettings()
    mae: MaeProbeSettings = MaeProbeSettings()
    held_out: float = Field(0.1, gt=0, lt=1)
    """share of each class' training images on which the head is chosen; the winner is trained again on all"""
    augment: bool = False
    """random crops with the encoder run in every step, as the papers do; false: one pass over centre crops"""


class LogisticSettings(Settings):
    """Logistic regression by L-BFGS."""

    strengths: list[Rate] = Field([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0], min_length=1)
    """L2 penalties: mean cross-entropy + strength / 2 x |W|^2, on features whose mean square is 1"""
    held_out: float = Field(0.1, gt=0, lt=1)
    """share of each class' training images on which the strength is chosen; then all are fitted"""
    iterations: int = Field(200, ge=1)
    """of L-BFGS at most"""
    precision: Literal["float32", "float64"] = "float64"


class LowshotSettings(Settings):
    """Logistic regression on few labels, as in MSN (arXiv 2204.07141); its optimizer's settings are `logistic`'s."""

    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.01, 0.1], min_length=1)
    """of all training images; every class gives the same number, at least one"""
    splits: int = Field(3, ge=1, le=100)
    """drawn for each share; the spread is over them"""
    folds: int = Field(5, ge=2)
    """parts of the few images in which the strength is chosen by cross-validation, where every class has two or more"""
    strength: float = Field(1e-3, gt=0)
    """where a class has a single image, so that nothing can be held out"""


class RetrievalSettings(Settings):
    """Retrieval of images of the same class by cosine."""

    gallery: Literal["test", "train"] = "test"
    """`test`: every test image searches all others; `train`: test images search the training images"""
    ks: list[Annotated[int, Field(ge=1)]] = Field([1, 5, 10, 100], min_length=1)
    """for mAP@k and recall@k"""


class AttentiveSettings(Settings):
    """Attentive probe: one cross-attention with a learned query over the last patch tokens, then a linear layer."""

    lrs: list[Rate] = Field([3e-4, 1e-3, 3e-3], min_length=1)
    weight_decay: float = Field(0.01, ge=0)
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(128, ge=1)
    head_dim: int = Field(64, ge=1)
    """width of an attention head; the widest divisor of the features' width up to it is taken"""
    held_out: float = Field(0.1, gt=0, lt=1)
    """share of each class' training images on which the learning rate is chosen; the winner is trained again on all"""
    augment: bool = False
    """random crops with the encoder run in every step; false: centre crops"""
    memory: float = Field(4.0, ge=0)
    """GB of patch tokens that are kept; beyond it the encoder runs again in every epoch"""


class CropSettings(Settings):
    """Random crops, for probes with `augment`."""

    scale: list[float] = Field([0.08, 1.0], min_length=2, max_length=2)
    """share of the image's area, [low, high]"""
    hflip: Share = 0.5


class EvaluateRecipe(Settings):
    """Everything that decides an evaluation."""

    protocols: list[Protocol] = Field(["knn"], min_length=1)
    """the command line's --protocol"""
    run: EvaluateRun = EvaluateRun()
    encoder: EvaluateEncoder = EvaluateEncoder()
    data: EvaluateData = EvaluateData()
    crops: CropSettings = CropSettings()
    knn: KnnSettings = KnnSettings()
    linear: LinearSettings = LinearSettings()
    logistic: LogisticSettings = LogisticSettings()
    lowshot: LowshotSettings = LowshotSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    attentive: AttentiveSettings = AttentiveSettings()


def read_evaluate_recipe(path: str | Path | None, overrides: Sequence[str], given: Mapping[str, Any]) -> EvaluateRecipe:
    """The recipe of an evaluation; arguments as of `tasks.read_task_recipe`.

    Raises:
        RecipeError: with one line for every problem.
    """
    raw = read_mapping(path, overrides, list(EvaluateRecipe.model_fields))
    for key, value in given.items():
        *sections, name = key.split(".")
        below = raw
        for section in sections:
            below = below.setdefault(section, {})
            if not isinstance(below, dict):
                raise RecipeError(f"{section} is {below!r}: it must be a mapping")
        below[name] = value
    return check(EvaluateRecipe, raw)
