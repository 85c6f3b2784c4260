"""Images for evaluation: a fixed sample, cut in the centre and resized, with labels if there are any, in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .decode import Decoder
from .order import permutation
from .settings import DataSettings
from .sources import Images, NoSplit, Source, Subset, open_named
from .views import center_box, cut


class Labelled(NamedTuple):
    """Pictures of n different images, in ascending order of their numbers."""

    images: Tensor
    """uint8 [n, C, H, W]"""
    labels: Tensor | None
    """int64 [n]"""
    ids: Tensor
    """int64 [n]"""


class ProbeSources(NamedTuple):
    """Where the probe's neighbours and queries come from; they share no image."""

    train: Images
    test: Images


def read_images(source: Source, count: int, size: tuple[int, int], data: DataSettings) -> Labelled:
    """Up to `count` images, the same ones in every call; broken ones are left out.

    Args:
        size: [height, width] of the result; the largest central part of this aspect is resized, with antialiasing.
        data: how to decode (channels, value range).

    Raises:
        ValueError: no image can be read.
    """
    decoder = Decoder.of(data)
    images, ids, labels = [], [], []
    for i, payload, label in source.sample(count):
        try:
            image = decoder(payload)
        except ValueError:
            continue  # the loader counts and names it
        box = center_box(image.shape[-2], image.shape[-1], size)
        images.append(cut(image, box, size, "bicubic"))
        ids.append(i)
        labels.append(label)
    if not images:
        raise ValueError(f"none of the images can be read in {source.describe()}")
    known = [label for label in labels if label is not None]
    return Labelled(torch.stack(images), torch.tensor(known) if len(known) == len(ids) else None, torch.tensor(ids))


def open_probe(data: DataSettings, source: Source | None = None) -> ProbeSources:
    """The labelled images of `data.probe`; `source` is the already opened `data.source`.

    Without a source of its own the probe takes the run's. Without a test set it takes part of the labelled images away
    from the neighbours and uses them as queries.

    Raises:
        ValueError: images without labels.
    """
    probe = data.probe
    assert probe is not None, "the recipe has no data.probe"
    columns = {"image": probe.image, "label": probe.label}
    if probe.source is None and data.streaming:
        raise ValueError("data.streaming gives no fixed labelled images: set data.probe.source")
    if probe.source is not None:
        named, options = probe.source, columns
        train = open_named(named, split=probe.split, **options)
    else:
        named = data.source
        options = {"config": data.config, "revision": data.revision, "image": data.image, "label": data.label}
        options |= {name: column for name, column in columns.items() if column}
        if isinstance(source, Images) and not any(columns.values()):
            train = source
        else:
            train = open_named(named, split=data.split, **options)
    if probe.test_source is not None:
        test = open_named(probe.test_source, split=probe.test_split, **columns)
    else:
        try:
            test = open_named(named, split=probe.test_split, **options)
        except NoSplit:
            train, test = hold_out(train, probe.test_images)
    for part in (train, test):
        if part.labels is None:
            raise ValueError(f"data.probe needs labels, there are none in {part.describe()}: set data.probe.source")
    return ProbeSources(train, _renumber(test, train))


def _renumber(test: Images, train: Images) -> Images:
    """Number the classes of `test` as `train` does: each source numbers the names it finds."""
    if test.class_names == train.class_names or test.class_names is None or train.class_names is None:
        return test
    names = [*train.class_names, *(name for name in test.class_names if name not in train.class_names)]
    out = Subset(test, torch.arange(len(test)), "renumbered classes")
    assert out.labels is not None
    out.labels = torch.tensor([names.index(name) for name in test.class_names])[out.labels]
    return out


def hold_out(source: Images, wanted: int) -> tuple[Images, Images]:
    """(the rest, at most `wanted` images and at most a fifth of all), the same ones in every call."""
    count = min(wanted, max(1, len(source) // 5))
    order = permutation(len(source), 0, 1)
    rest, held = order[count:].sort().values, order[:count].sort().values
    return Subset(source, rest, "not held out"), Subset(source, held, "held out for the probe")
