"""Weighted k-nearest neighbours (arXiv 1805.01978) with DINO's numbers, beside the same on raw pixels.

The search is `monitor.knn`: exact, float32, in blocks of test images that are dealt out to the processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...monitor.knn import knn_predictions
from .settings import KnnSettings
from .work import Bench, Found, accuracies, dealt, top1

_BLOCK = 256  # test images of one comparison, fixed so that rounding does not depend on the processes


def run(bench: Bench, cfg: KnnSettings) -> Found:
    """Accuracy for every k.

    Raises:
        ValueError: every k is larger than the number of training images.
    """
    ks = [k for k in cfg.k if k <= len(bench.train.labels)]
    if not ks:
        raise ValueError(f"knn.k is {cfg.k}, but there are {len(bench.train.labels)} training images: lower k")
    if len(ks) < len(cfg.k):
        left = sorted(set(cfg.k) - set(ks))
        bench.say(f"k-NN: k = {', '.join(map(str, left))} is left out, there are {len(bench.train.labels)} images")
    best = cfg.headline if cfg.headline in ks else ks[0]
    metrics: dict[str, float] = {}
    predictions = predict(bench, "pooled", ks, cfg.temperature)
    metrics |= accuracies(predictions[best], bench.test.labels)
    metrics |= {f"k={k}": top1(predictions[k], bench.test.labels) for k in ks}
    if cfg.raw_pixels:
        raw = predict(bench, "pixels", ks, cfg.temperature)
        metrics["raw_pixels"] = top1(raw[best], bench.test.labels)
        metrics |= {f"raw_pixels/k={k}": top1(raw[k], bench.test.labels) for k in ks}
    return Found("top1", metrics, {"k": best})


def predict(bench: Bench, name: str, ks: list[int], temperature: float) -> dict[int, Tensor]:
    """Predicted classes [m] of the test images for every k, from the features called `name`."""
    train, test = bench.train.features[name].to(bench.device), bench.test.features[name]
    blocks = torch.arange(len(test)).split(_BLOCK)

    def block(rows: Tensor) -> dict[int, Tensor]:
        part = test[rows].to(bench.device)
        found = knn_predictions(train, bench.train.labels, part, ks, temperature, _BLOCK)
        return {k: winners.cpu() for k, winners in found.items()}

    found = dealt(blocks, block)
    return {k: torch.cat([each[k] for each in found]) for k in ks}
