"""The recipe: its schema, a strict YAML reader, overrides, and errors that name the nearest key.

A recipe is data. Sections are owned by the rooms that use them; this file only puts them together, checks what no
single section can check, and turns every problem into one list of sentences.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from .data.settings import DataSettings, MaskSettings, ViewSettings
from .encoder import EncoderSettings
from .monitor.settings import MonitorSettings
from .objectives import objective_class
from .objectives.base import ObjectiveSettings
from .optim import OptimizerSettings
from .schedule import Duration, Ramp, Value
from .settings import Settings


class RecipeError(ValueError):
    """Something the user has to change: what was given, what is allowed, what to do."""


class TeacherSettings(Settings):
    """The exponential moving average of the student; exists only if an objective asks for it."""

    momentum: Value = Ramp(start=0.996, end=1.0, shape="cosine")
    offset: Literal[0, 1] = 0
    """which step's momentum moves the teacher after step t: t + offset. MoCo v3 moves its teacher before the key pass,
    which is the move after the step with the next step's momentum: 1. DINO, BYOL, iBOT: 0"""


class ExportSettings(Settings):
    """The encoder that leaves the run."""

    which: Literal["auto", "teacher", "student"] = "auto"
    """`auto`: the teacher if there is one, else the student"""
    every: Duration | None = None
    """also export during the run"""
    licence: str = "other"
    """licence identifier written on the card; trained weights belong to whoever trained them"""
    verify: bool = True
    """reload in a fresh process with timm (and transformers, if installed) and compare outputs"""


class RunSettings(Settings):
    """How long, how large, where to."""

    length: Duration
    """`300 epochs`, `10000 steps`"""
    batch_size: int = Field(ge=1)
    """images in one optimizer step, over all processes and micro-batches"""
    micro_batch: int | None = Field(None, ge=1)
    """images in one forward pass of one process; null: batch_size / processes. The rest is gradient accumulation"""
    out: str
    """output folder"""
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = Field(2, ge=0)
    """loader processes of each process"""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each process; null: as torch decides"""
    checkpoint_every: Duration = "5%"
    keep: int = Field(2, ge=2)
    """checkpoints kept; at least two, so that a broken newest one loses little"""
    gradient_checkpointing: bool = False
    """recompute the encoder's blocks in the backward pass: about 80 % less memory, 30 to 50 % more time"""
    compile: bool = False
    """torch.compile of the encoder's blocks"""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []


class Recipe(Settings):
    """Everything that decides a run."""

    run: RunSettings
    encoder: EncoderSettings
    data: DataSettings
    views: dict[str, ViewSettings] = Field(min_length=1)
    masks: dict[str, MaskSettings] = {}
    objectives: dict[str, Any] = Field(min_length=1)
    """label -> settings; `name` picks the objective and defaults to the label"""
    teacher: TeacherSettings = TeacherSettings()
    optimizer: OptimizerSettings
    monitor: MonitorSettings = MonitorSettings()
    export: ExportSettings = ExportSettings()

    @model_validator(mode="after")
    def _views_exist(self) -> Recipe:
        for name, mask in self.masks.items():
            if mask.view not in self.views:
                raise ValueError(f"mask {name!r} is for view {mask.view!r}; views are: {', '.join(self.views)}")
        return self
