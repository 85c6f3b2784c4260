"""What a run knows about the encoder it hands over, without what belongs to nobody else.

Paths, hosts, user names and tokens are left out by construction: a data source is named only if anybody can look it
up (a Hub data set, or the one that comes with the package); any other becomes "local images".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from ..config import Recipe
from ..objectives import objective_class
from ..schedule import Ramp

LOCAL = "local images"
_PUBLIC = re.compile(r"((embedded|hf-hub):)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIX = re.compile(r"\.(txt|tar|parquet|arrow|csv|jsonl?|zip|gz|pth|pt|bin|ckpt|safetensors)\b", re.IGNORECASE)
_PLACE = re.compile(r"[/~\\]|[A-Za-z]:\\|\.\.?/|\w+://")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_PLACES = {"source", "test_source", "init"}  # keys of a recipe whose values may be folders


@dataclass(frozen=True)
class CardFacts:
    """What a run knows about the encoder it hands over. Everything is optional; what is missing is not mentioned."""

    title: str = "encoder"
    network: str = "student"
    """which of the run's networks this is: student or teacher"""
    objectives: Mapping[str, str] = field(default_factory=dict)
    """label -> weight as text, e.g. {"mae": "1", "moco_v3": "0.1 to 1 over 10 epochs"}"""
    methods: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """name of a method -> (what it is, arXiv id)"""
    data: Sequence[str] = ()
    """sources as the recipe names them; local ones are not printed"""
    images: int | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    """e.g. "1 x NVIDIA H200", "2 CPU cores" """
    probe: Mapping[str, float] = field(default_factory=dict)
    """k-NN accuracies in 0..1 by who computed the features: "this encoder", "raw pixels", "before training" """
    probe_name: str = "k-NN top-1"
    base_model: str | None = None
    """where the weights started, if not at random"""
    kept: Mapping[str, float] = field(default_factory=dict)
    """likeness of the features to those of `base_model`, by measure: "cosine", "linear CKA" """
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """the resolved recipe"""

    @property
    def papers(self) -> tuple[str, ...]:
        """arXiv ids of the methods, each once."""
        return tuple(dict.fromkeys(paper for _, paper in self.methods.values()))

    @property
    def public_data(self) -> list[str]:
        """The sources that anybody can look up."""
        return [name for name in self.data if is_public(name)]

    def summary(self) -> dict[str, Any]:
        """The `ssl` block of config.json: how the encoder was trained, without anything private."""
        facts = {
            "network": self.network,
            "objectives": dict(self.objectives),
            "images": self.images,
            "steps": self.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seconds": self.seconds,
            "hardware": self.hardware,
            "probe": {self.probe_name: dict(self.probe)} if self.probe else None,
            "base_model": self.base_model if self.base_model and is_public(self.base_model) else None,
            "likeness_to_start": dict(self.kept),
            "recipe": without_places(self.recipe),
        }
        return {key: value for key, value in facts.items() if value not in (None, {}, [])}


def facts_of(
    recipe: Recipe,
    *,
    network: str,
    step: int,
    steps_per_epoch: int,
    images: int | None = None,
    seconds: float | None = None,
    hardware: str | None = None,
    probe: Mapping[str, float] | None = None,
    kept: Mapping[str, float] | None = None,
) -> CardFacts:
    """The facts of a run at optimizer step `step`."""
    names = recipe.used_names
    source = recipe.data.source
    return CardFacts(
        title=f"{recipe.encoder.name} pretrained with {' + '.join(names)}",
        network=network,
        objectives={label: _weight(settings.weight) for label, settings in recipe.objectives.items()},
        methods={name: method for name in dict.fromkeys(names.values()) if (method := method_of(name))},
        data=[source] if isinstance(source, str) else list(source),
        images=images,
        steps=step,
        epochs=step / steps_per_epoch,
        batch_size=recipe.run.batch_size,
        seconds=seconds,
        hardware=hardware,
        probe=dict(probe or {}),
        base_model=_base_model(recipe.encoder.name, recipe.encoder.init),
        kept=dict(kept or {}),
        recipe=recipe.model_dump(mode="json"),
    )


def method_of(name: str) -> tuple[str, str] | None:
    """(what the objective is, its paper's arXiv id), both from its module's docstring; None if that names no paper."""
    text = sys.modules[objective_class(name).__module__].__doc__ or ""
    paper = re.search(r"arXiv[:\s]+(\d{4}\.\d{4,5})", text)
    return (text.strip().splitlines()[0], paper[1]) if paper else None


def is_public(source: str) -> bool:
    """Whether `source` is something anybody can look up rather than a place on somebody's disk."""
    return bool(_PUBLIC.fullmatch(source)) and not _FILE_SUFFIX.search(source) and not Path(source).exists()


def without_places(node: Any, key: str = "") -> Any:
    """A copy of a resolved recipe without folders, addresses and tokens."""
    if isinstance(node, Mapping):
        return {k: without_places(v, k) for k, v in node.items() if k != "out"}
    if isinstance(node, list | tuple):
        return [without_places(v, key) for v in node]
    if not isinstance(node, str):
        return node
    if _PLACE.match(node) or (key in _PLACES and not is_public(node)):
        return LOCAL
    return _TOKEN.sub("(removed)", node)


def _weight(value: float | Ramp) -> str:
    if not isinstance(value, Ramp):
        return f"{value:g}"
    return f"{value.start:g} to {value.end:g} over {value.over}"


def _base_model(name: str, init: str | None) -> str | None:
    """The Hub's name of published weights, or the folder or file that the run started from."""
    if init is None or Path(init).exists():
        return init
    if init.startswith("hf-hub:"):
        return init.removeprefix("hf-hub:")
    name = name if init == "timm" else init
    if not timm.is_model(name.split(".")[0]):
        return init
    published = timm.get_pretrained_cfg(name)
    tag = f".{published.tag}" if published and "." not in name else ""
    return f"timm/{name}{tag}"
