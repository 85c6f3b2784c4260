"""The recipe: its schema, and what no single section of it can check.

A recipe is data. Sections are owned by the rooms that use them; this file only puts them together, checks what no
single section can check, and turns every problem into one list of sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from torch import nn

from .data.settings import DataSettings, MaskSettings, ViewSettings, shown
from .frozen import FrozenSettings
from .monitor.settings import MonitorSettings
from .objectives import objective_class
from .optim import OptimizerSettings
from .reading import RecipeError, dump_yaml, read_mapping, sentences
from .schedule import Duration, Ramp, Value, within
from .settings import EncoderSettings, Settings


class TeacherSettings(Settings):
    """The exponential moving average of the student; exists only if an objective asks for it."""

    momentum: Annotated[Value, within(0, 1)] = Ramp(start=0.996, end=1.0, shape="cosine")
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


class HubSettings(Settings):
    """Where the encoder is pushed to, with the token of the environment (HF_TOKEN) or of `hf auth login`."""

    repo: str | None = None
    """`user/name` on the Hugging Face Hub; null: nothing leaves this machine"""
    private: bool = True
    """of a repository that is made; one that is there and public is then refused"""
    push: Duration | None = None
    """also push during the run; at its end always"""

    @field_validator("repo")
    @classmethod
    def _has_owner(cls, repo: str | None) -> str | None:
        if repo is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
            raise ValueError(f"{repo!r} is no repository of the Hub: write user/name")
        return repo

    @model_validator(mode="after")
    def _push_has_a_place(self) -> HubSettings:
        if self.push and not self.repo:
            raise ValueError("push needs a repository: set hub.repo to user/name")
        return self


class RunSettings(Settings):
    """How long, how large, where to."""

    length: Duration
    """`300 epochs`, `10000 steps`"""
    batch_size: int = Field(ge=1)
    """images in one optimizer step, over all processes and micro-batches"""
    micro_batch: int | None = Field(None, ge=1)
    """images in one forward pass of one process; null: batch_size / processes. The rest is gradient accumulation"""
    out: str = Field(min_length=1)
    """output folder"""
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    workers: int = Field(2, ge=0, le=1024)
    """loader processes of each process"""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads of each process; null: as torch decides"""
    checkpoint_every: Duration = "5%"
    keep: int = Field(2, ge=2)
    """checkpoints kept; at least two, so that a broken newest one loses little"""
    gradient_checkpointing: bool = False
    """recompute the encoder's blocks in the backward pass: about 80 % less memory, 30 to 50 % more time"""
    compile: bool = False
    """torch.compile of the encoder's blocks"""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []

    @field_validator("length")
    @classmethod
    def _no_share(cls, length: str) -> str:
        if length.strip().endswith("%"):
            raise ValueError(f"{length!r} is a share of what? Write '300 epochs' or '10000 steps'")
        return length


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
    frozen: dict[str, FrozenSettings] = {}
    """name -> an encoder that is not trained, for objectives that ask for it"""
    optimizer: OptimizerSettings
    monitor: MonitorSettings = MonitorSettings()
    export: ExportSettings = ExportSettings()
    hub: HubSettings = HubSettings()

    @model_validator(mode="after")
    def _views_exist(self) -> Recipe:
        for name, mask in self.masks.items():
            if mask.view not in self.views:
                raise ValueError(f"mask {name!r} is for view {mask.view!r}; views are: {', '.join(self.views)}")
        return self

    @model_validator(mode="after")
    def _modalities_exist(self) -> Recipe:
        shown((view.modality for view in self.views.values()), self.data.modalities)
        for name, view in self.views.items():
            if view.modality and (not name.isidentifier() or hasattr(nn.ModuleDict, name)):
                raise ValueError(f"{name!r} cannot name a view of a modality: choose another word, e.g. depth, semseg")
        return self

    @model_validator(mode="after")
    def _something_to_hold(self) -> Recipe:
        if self.optimizer.hold_encoder and self.encoder.init is None:
            raise ValueError("optimizer.hold_encoder holds what the encoder knows already: set encoder.init, or null")
        return self

    @field_validator("frozen")
    @classmethod
    def _names_are_free(cls, frozen: dict[str, FrozenSettings]) -> dict[str, FrozenSettings]:
        for name in frozen:
            if name in ("student", "teacher") or not name.isidentifier() or hasattr(nn.ModuleDict, name):
                raise ValueError(f"{name!r} cannot name a frozen encoder: choose another word, e.g. gram, start, large")
        return frozen

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """View -> (height, width), of those that show the images; other modalities do not pass the patch embedding."""
        return {name: view.height_width for name, view in self.views.items() if view.modality is None}

    @property
    def native_size(self) -> tuple[int, int]:
        """The encoder's image size: of the largest view that is no picture `like` another one's."""
        sizes = [view.height_width for view in self.views.values() if view.like is None]
        return max(sizes or [view.height_width for view in self.views.values()], key=lambda size: size[0] * size[1])

    @property
    def used_names(self) -> dict[str, str]:
        """Objective label -> name, for cards and logs."""
        return {label: settings.name for label, settings in self.objectives.items()}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key.path=value` overrides, and check everything.

    Raises:
        RecipeError: with one line for every problem.
    """
    raw = read_mapping(path, overrides, list(Recipe.model_fields))
    return build_recipe(raw)


def build_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Check plain data against the schema; all problems are reported at once, as a `RecipeError`."""
    problems: list[str] = []
    data = dict(raw)
    objectives: dict[str, Any] = {}
    entries = data.get("objectives")
    for label, entry in entries.items() if isinstance(entries, dict) else ():
        objectives[label] = _objective_settings(label, entry, problems)
    if objectives:
        data["objectives"] = objectives
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += sentences(error, Recipe, data)
    if problems or recipe is None:
        raise RecipeError("\n  ".join(["the recipe has to be changed:", *dict.fromkeys(problems)]))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default included; reading it back gives the same recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _objective_settings(label: str, entry: Any, problems: list[str]) -> Any:
    entry = {} if entry is None else entry
    if not str(label).isidentifier() or hasattr(nn.ModuleDict, str(label)):
        problems.append(f"objectives.{label}: a label is a word of letters, digits and _, none that torch uses itself")
        return entry
    if not isinstance(entry, dict):
        problems.append(f"objectives.{label}: settings are a mapping, got {entry!r}; write {label}: {{weight: 1.0}}")
        return entry
    name = entry.get("name", label)
    try:
        config = objective_class(str(name)).Config
        return config.model_validate({"name": name} | entry)
    except ValidationError as error:
        problems += [f"objectives.{label}.{sentence}" for sentence in sentences(error, config, entry)]
    except ValueError as error:
        problems.append(f"objectives.{label}: {error}")
    return entry
