"""Weighted k-nearest-neighbour classification of frozen features: the number that tells whether a run learns.

Each test image asks its k most similar training images for their labels; a vote counts exp(cosine / temperature)
(Wu et al., arXiv 1805.01978; k = 20 and temperature 0.07 as in DINO, arXiv 2104.14294). Nothing is trained, so the
number moves only if the features do. The search is exact and done in chunks of test images.

Ties are settled the same way everywhere: of equally similar training images the first counts, of classes with equal
votes the lowest number. Shapes: n training images, m test images, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SIMILARITIES = 2**24  # similarities held at once: 64 MiB of float32


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> float:
    """Share of test images whose weighted vote names their label, between 0 and 1.

    Args:
        train: [n, D] features, any float type and device; normalised and compared in float32.
        train_labels: [n] int64, from 0.
        test: [m, D] features on the same device.
        test_labels: [m] int64; a label that no training image has counts as missed.
        k: neighbours asked, at most n.
        temperature: of the votes; smaller listens more to the nearest.
        chunk: test images compared at once; None keeps the similarities below 64 MiB.
    """
    predictions = knn_predictions(train, train_labels, test, (k,), temperature, chunk)[k]
    return (predictions == test_labels.to(predictions.device)).float().mean().item()


def knn_predictions(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Predicted labels [m] for several k from one search; arguments as in `knn_accuracy`."""
    _check(train, train_labels, test, ks, temperature)
    classes = int(train_labels.max()) + 1
    labels = train_labels.to(train.device)
    chunk = chunk or max(1, _SIMILARITIES // len(train))
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    with torch.no_grad(), torch.autocast(train.device.type, enabled=False):
        keys = normalize(train.float(), dim=1)
        for part in test.split(chunk):
            similarity = normalize(part.float(), dim=1) @ keys.T  # [chunk, n]
            cosine, index = nearest(similarity, max(ks))
            for k, winner in _votes(cosine, labels[index], classes, ks, temperature).items():
                found[k].append(winner)
    return {k: torch.cat(winners) for k, winners in found.items()}


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in falling order, the first column first among equals: values and columns [rows, k]."""
    values, index = similarity.topk(k, dim=1)
    index, order = index.sort(dim=1)  # then a stable sort by value leaves equals in column order
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    # topk takes any of several equals; rows where it had a choice at the k-th place are sorted in full
    choice = (similarity >= values[:, -1:]).sum(dim=1) > k
    if choice.any():
        full, columns = similarity[choice].sort(dim=1, descending=True, stable=True)
        values[choice], index[choice] = full[:, :k], columns[:, :k]
    return values, index


def _votes(cosine: Tensor, labels: Tensor, classes: int, ks: Sequence[int], temperature: float) -> dict[int, Tensor]:
    """Winning class of the first k neighbours, for each k; neighbours are added one by one, nearest first."""
    weight = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest: exp(1 / 0.01) is no float32
    votes = weight.new_zeros(len(weight), classes)
    winners = {}
    for j in range(max(ks)):
        # one label a row and call: scatter_add_ has no collisions and is deterministic on every device
        votes.scatter_add_(1, labels[:, j : j + 1], weight[:, j : j + 1])
        if j + 1 in ks:
            winners[j + 1] = votes.argmax(dim=1)
    return winners


def _check(train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int], temperature: float) -> None:
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1]:
        raise ValueError(f"k-NN compares [n, D] with [m, D], got {tuple(train.shape)} and {tuple(test.shape)}")
    if labels.shape != train.shape[:1] or labels.is_floating_point():
        raise ValueError(f"k-NN needs one integer label for each of {len(train)} images, got {tuple(labels.shape)}")
    if len(labels) == 0 or labels.min() < 0:
        raise ValueError("k-NN needs training images with labels from 0; leave images without a label out")
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(f"k-NN with k = {list(ks)} on {len(train)} training images: k goes from 1 to {len(train)}")
    if not temperature > 0:
        raise ValueError(f"k-NN with temperature {temperature}: it must be above 0 (0.07 is usual)")
