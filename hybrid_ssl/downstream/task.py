"""What a fine-tuning task brings: samples, a model, a measure. The loop (`fit.py`) knows nothing else about it.

Images travel as uint8 and are normalised inside the model, on its device, with the encoder's mean and std (its
buffers): a quarter of the bytes, and a stored model needs nothing told.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from .settings import FinetuneRecipe


class Samples(Protocol):
    """Pictures with their truth, by number."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a person would call picture `i`."""

    def read(self, i: int, rng: Random | None) -> Any:
        """One sample, augmented with `rng`, or as it is tested (None). ValueError with the reason if it is broken."""


class Batch(NamedTuple):
    """What the model gets: `model(batch.images, batch.targets)`."""

    images: Any
    """uint8 [B, C, H, W], or a list of uint8 [C, H, W]"""
    targets: Any
    ids: tuple[int, ...] = ()
    """numbers of the samples"""


class Task(ABC):
    """One fine-tuning task, built from its recipe. Building it reads the data's lists and writes nothing.

    Attributes:
        recipe: of the task.
        model: nn.Module with the timm encoder as `model.encoder`; in training `model(images, targets)` returns
            {"name": loss} (their sum is minimised), in eval `model(images)` returns predictions. It must work under
            DistributedDataParallel: every trained parameter takes part in every training pass.
        classes: names, in the order of the class numbers.
        train, test: samples.
    """

    kind: ClassVar[str]
    """`classification`, `detection` or `segmentation`"""
    headline: ClassVar[str]
    """the key of `evaluate`'s result that stands for all; larger is better"""
    recipe: FinetuneRecipe
    model: nn.Module
    classes: list[str]
    train: Samples
    test: Samples

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> tuple[Any, Any]:
        """(images, targets) of a batch; samples as `Samples.read` gives them."""

    def mix(self, images: Any, targets: Any, rng: Random) -> tuple[Any, Any]:
        """What is done to a whole training batch before it goes to the device, e.g. mixup."""
        return images, targets

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
        """Measure `model` (in eval mode, on its device) on this process' share of the test set.

        `batches` are on the device, every test sample in exactly one process, none twice. Sums and lists are brought
        together over `accelerator` here; every process returns the same numbers.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """All that `rebuild` needs besides weights, as JSON: classes, sizes, head, the timm architecture and args."""

    @abstractmethod
    def draw(self, model: nn.Module, path: Path) -> None:
        """A picture of predictions beside the truth, for some test images, the same ones every time."""

    def export(self, model: nn.Module, out: Path, metrics: Mapping[str, float]) -> str:
        """Write the trained model also as others load it; a line about that, or nothing if there is no such form."""
        return ""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What is told about the data in logs and results (counts, sizes, problems found), as JSON; no paths."""


class Fitted(Protocol):
    """A stored fine-tuned model, as `predict` uses it; every task has a subclass of `nn.Module` that is one."""

    classes: list[str]

    def predict(self, image: Tensor) -> dict[str, Any]:
        """uint8 [C, H, W] of any size -> what was found, in pixels of that image."""

    def draw(self, image: Tensor, found: dict[str, Any]) -> Tensor:
        """uint8 [3, H, W]: the image with what was found on it."""
