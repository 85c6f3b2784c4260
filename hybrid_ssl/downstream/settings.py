"""What every fine-tuning recipe has in common; each task adds its `data`, `model` and augmentation beside its code."""

from __future__ import annotations

from pydantic import Field, field_validator

from ..config import RunSettings
from ..optim import ClipSettings, OptimizerSettings
from ..schedule import Duration
from ..settings import Settings


class FinetuneRun(RunSettings):
    """As in pretraining, with defaults that suit a small labelled data set."""

    length: Duration = "50 epochs"
    batch_size: int = Field(32, ge=1)
    out: str = Field("runs/finetune", min_length=1)
    checkpoint_every: Duration = "20%"
    evaluate_every: Duration = "20%"
    """how often the test set is measured; at the end always"""
    test_batch: int = Field(64, ge=1)
    """images of one process in a forward pass without gradient"""
    max_broken: float = Field(0.01, ge=0, le=1)
    """share of training or test samples that may be unreadable; others take their place, or they are left out"""


class FinetuneEncoder(Settings):
    """The encoder that is fine-tuned; its name is given on the command line."""

    name: str = ""
    """an exported folder, a run's folder, `hf-hub:user/name` or a timm model name; the command line's ENCODER"""
    random: bool = False
    """the same architecture with random weights: what fine-tuning reaches without pretraining"""
    size: int | list[int] | None = None
    """pixels of a side, or [height, width], for which positions and windows are made; null: the task's image size"""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """stochastic depth, linearly growing over the blocks"""
    frozen: bool = False
    """train the head alone"""

    @field_validator("size")
    @classmethod
    def _two_sides(cls, size: int | list[int] | None) -> int | list[int] | None:
        sides = [size] if isinstance(size, int) else size or [1]
        if min(sides) < 1 or len(sides) > 2:
            raise ValueError(f"{size!r} is no size: give one number of pixels, or [height, width]")
        return size


class FinetuneRecipe(Settings):
    """Everything that decides a fine-tuning; the defaults are those of BEiT and MAE with small batches."""

    run: FinetuneRun = FinetuneRun()
    encoder: FinetuneEncoder = FinetuneEncoder()
    optimizer: OptimizerSettings = OptimizerSettings(
        lr=1e-3, lr_per=256, warmup="5%", layer_decay=0.75, weight_decay=0.05, clip=ClipSettings(norm=3.0)
    )
    ema: float | None = Field(None, gt=0, lt=1)
    """decay of an average of the weights, which is then evaluated and exported; null: none"""
