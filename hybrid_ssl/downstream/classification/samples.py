"""Labelled images of a fine-tuning: two splits whose classes are brought together by their names.

What does not fit is counted and named: images of classes that training never shows cannot be answered and are left out
of the test set, images with a negative number (the Hub's "no label") are left out of both.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.decode import Decoder
from ...data.order import permutation
from ...data.sources import Images, NoSplit, open_named
from ...data.views import center_box, cut
from .settings import LabelledData

TEST_SPLITS = ("val", "validation", "valid", "test")  # `test` last: ImageNet's on the Hub has no labels


class LabelledImages:
    """Images of one split (`Samples`).

    Args:
        source: where they are.
        rows: which of them, int64 [n].
        labels: class numbers, int64 [n].
        decode: payload -> uint8 [C, H, W].
        size: [height, width] of a test image.
        crop: share of the side that is tested.
        augment: what makes a training image.
    """

    def __init__(
        self,
        source: Images,
        rows: Tensor,
        labels: Tensor,
        decode: Decoder,
        size: tuple[int, int],
        crop: float,
        augment: Callable[[Tensor, Random], Tensor],
    ) -> None:
        self.source, self.rows, self.labels = source, rows, labels
        self.decode, self.size, self.crop, self.augment = decode, size, crop, augment

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))

    def read(self, i: int, rng: Random | None) -> tuple[Tensor, int]:
        """(uint8 [C, h, w], class number); ValueError with the reason if the image is broken."""
        image = self.decode(self.source.read(int(self.rows[i]))[0])
        shown = centre(image, self.size, self.crop) if rng is None else self.augment(image, rng)
        return shown, int(self.labels[i])


def centre(image: Tensor, size: tuple[int, int], share: float) -> Tensor:
    """The centre of an image, `share` of its largest part with the aspect of `size`: uint8 [C, H, W] -> [C, h, w]."""
    height, width = image.shape[-2:]
    box = center_box(height, width, size)
    h, w = max(1, round(box.height * share)), max(1, round(box.width * share))
    return cut(image, box._replace(top=(height - h) // 2, left=(width - w) // 2, height=h, width=w), size, "bicubic")


class Part(NamedTuple):
    """Rows of a source that have a class."""

    source: Images
    rows: Tensor
    """int64 [n]"""
    labels: Tensor
    """int64 [n]"""


class Parts(NamedTuple):
    """Two splits with common class numbers."""

    train: Part
    test: Part
    classes: list[str]
    problems: list[str]
    """sentences about what was left out"""


def open_parts(cfg: LabelledData) -> Parts:
    """Open both splits of the recipe's data.

    Raises:
        ValueError: no source, no test set, no labels, fewer than two classes, or no common class.
    """
    if not cfg.source:
        raise ValueError("data.source is empty: give the images on the command line with --data")
    columns: dict[str, Any] = {"image": cfg.image, "label": cfg.label}
    options = columns | {"config": cfg.config, "revision": cfg.revision}
    train = open_named(cfg.source, split=cfg.split, **options)
    test = _open_test(cfg, columns, options)
    problems: list[str] = []
    classes, train_labels = _number(train, None, "training", problems)
    if len(classes) < 2:
        raise ValueError(f"{train.describe()}: one class ({classes[0]}), two are needed")
    if test is None:
        learnt, tested = _hold_out(train_labels, cfg.hold_out)
        parts = [Part(train, rows, train_labels[rows]) for rows in (learnt, tested)]
    else:
        numbered = (train_labels, _number(test, classes, "test", problems)[1])
        known = [(labels >= 0).nonzero()[:, 0] for labels in numbered]
        parts = [
            Part(source, rows, labels[rows])
            for source, rows, labels in zip((train, test), known, numbered, strict=True)
        ]
    learnt_part, tested_part = (
        _limit(part, most) for part, most in zip(parts, (cfg.limit, cfg.test_limit), strict=True)
    )
    return Parts(learnt_part, tested_part, classes, problems)


def _open_test(cfg: LabelledData, columns: dict[str, Any], options: dict[str, Any]) -> Images | None:
    """None: part of the training images is held out."""
    named = cfg.source if cfg.test_source is None else cfg.test_source
    options = options if cfg.test_source is None else columns
    if cfg.test_split is not None:
        return open_named(named, split=cfg.test_split, **options)
    if cfg.test_source is None and cfg.hold_out:
        return None
    for split in (*TEST_SPLITS, *(["train"] if cfg.test_source is not None else [])):
        if cfg.test_source is None and split == cfg.split:
            continue
        try:
            return open_named(named, split=split, **options)
        except NoSplit as problem:
            missing = problem
    raise ValueError(
        f"no test set: {missing}. Put test images into a folder `val` beside `train`, or give data.test_source, "
        "data.test_split, or data.hold_out=0.2"
    )


def _number(source: Images, classes: list[str] | None, which: str, problems: list[str]) -> tuple[list[str], Tensor]:
    """Class names, and the class of each image, -1 for none; `classes`: the training's, None for training itself."""
    labels = source.labels
    if labels is None:
        raise ValueError(
            f"classification needs labels, there are none in {source.describe()}: use a folder for each class, "
            "or a table and data.label"
        )
    unlabelled = int((labels < 0).sum())
    if unlabelled == len(labels):
        raise ValueError(f"no image has a label in {source.describe()}")
    if unlabelled:
        problems.append(f"{unlabelled} {which} images without label (a negative number) are left out")
    names = source.class_names
    values = sorted(set(labels[labels >= 0].tolist()))
    if names is not None and values[-1] >= len(names):
        raise ValueError(f"{source.describe()}: there are {len(names)} classes, but also the label {values[-1]}")
    own = {value: names[value] if names is not None else str(value) for value in values}
    if classes is None:
        classes = list(names) if names is not None else list(own.values())
        if empty := sorted(set(classes) - set(own.values())):
            problems.append(f"{len(empty)} classes without a training image: {_listed(empty)}")
    strangers = [name for name in own.values() if name not in classes]
    if len(strangers) == len(own):
        raise ValueError(
            f"no class of the test set is one of the training's: {_listed(strangers)} instead of {_listed(classes)}"
        )
    place = {name: i for i, name in enumerate(classes)}
    table = torch.tensor([place.get(own.get(value, ""), -1) for value in range(values[-1] + 1)] + [-1])
    numbers = table[labels.clamp(min=-1)]  # the last entry: no label
    if strangers:
        count = int((numbers < 0).sum()) - unlabelled
        problems.append(f"{count} test images of classes that training lacks are left out: {_listed(strangers)}")
    return classes, numbers


def _hold_out(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Rows to learn from and rows to test on, both with labels, the same ones in every call."""
    rows = (labels >= 0).nonzero()[:, 0]
    count = max(1, round(len(rows) * share))
    order = rows[permutation(len(rows), 0, 1)]
    return order[count:].sort().values, order[:count].sort().values


def _limit(part: Part, most: int | None) -> Part:
    """At most that many images (drawn: the first ones of sorted folders would be one class)."""
    if most is None or most >= len(part.rows):
        return part
    kept = permutation(len(part.rows), 0, 0)[:most].sort().values
    return Part(part.source, part.rows[kept], part.labels[kept])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
