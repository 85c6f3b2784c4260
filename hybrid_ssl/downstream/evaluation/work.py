"""What all protocols share: labelled features, work dealt out to processes, parts held out, accuracies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...data.order import permutation
from ...nn.distributed import gather_objects, rank, world_size
from .features import Say, Split

Item = TypeVar("Item")
Result = TypeVar("Result")


class Bench(NamedTuple):
    """What a protocol works on."""

    train: Split
    test: Split
    classes: list[str]
    seed: int
    device: torch.device
    say: Say


class Found(NamedTuple):
    """What a protocol comes to."""

    metric: str
    """the key of `metrics` that stands for all"""
    metrics: dict[str, float]
    chosen: dict[str, Any]
    """what was chosen on held-out training images, as JSON"""


def dealt(items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
    """[work(item) for item in items], each by one process; all get all results, moved to the CPU by `work`.

    An item's work does not depend on the number of processes, so neither do the results.
    """
    mine = [(i, work(items[i])) for i in range(rank(), len(items), world_size())]
    together = [each for part in gather_objects(mine) for each in part]
    return [result for _, result in sorted(together, key=lambda each: each[0])]


class Parts(NamedTuple):
    """Rows to fit on and rows to choose on."""

    fit: Tensor
    held: Tensor


def held_out(labels: Tensor, share: float, seed: int) -> Parts:
    """Of every class the share that is asked for, at least one image where there are two.

    Raises:
        ValueError: no class has two images.
    """
    held = []
    for rows in by_class(labels, seed):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held.append(rows[:count])
    chosen = torch.cat(held).sort().values
    if len(chosen) == 0:
        raise ValueError("every class has one training image, so nothing can be held out: add images, or use knn")
    return _parts(len(labels), chosen)


def folds(labels: Tensor, most: int, seed: int) -> list[Parts]:
    """Cross-validation: every class' images dealt out to as many folds as the smallest class allows, at most `most`.

    Empty where some class has a single image.
    """
    classes = by_class(labels, seed)
    count = min(most, *(len(rows) for rows in classes))
    if count < 2:
        return []
    return [_parts(len(labels), torch.cat([rows[k::count] for rows in classes]).sort().values) for k in range(count)]


def by_class(labels: Tensor, seed: int) -> list[Tensor]:
    """Rows of each class that has any, shuffled; another seed shuffles in another way."""
    classes = labels.unique().tolist()
    grouped = [(labels == number).nonzero()[:, 0] for number in classes]
    return [rows[permutation(len(rows), seed, number)] for rows, number in zip(grouped, classes, strict=True)]


def _parts(n: int, held: Tensor) -> Parts:
    fit = torch.ones(n, dtype=torch.bool)
    fit[held] = False
    return Parts(fit.nonzero()[:, 0], held)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (predicted.cpu() == labels.cpu()).double().mean().item()


def accuracies(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """`top1`, and `mean_class`: the mean of the classes' accuracies, whatever their sizes."""
    right = (predicted.cpu() == labels.cpu()).double()
    classes = [right[labels == number].mean() for number in labels.unique().tolist()]
    return {"top1": right.mean().item(), "mean_class": torch.stack(classes).mean().item()}
