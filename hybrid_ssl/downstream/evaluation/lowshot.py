"""Few labels: logistic regression on 1 % and 10 % of the training images, over several fixed draws.

As the semi-supervised tables of SimCLR (arXiv 2002.05709) and MSN (2204.07141): a draw takes the same number of
images from every class (all of a class that has fewer), at least one. It is a function of the data's order and its
number, whatever the encoder and the seed of the run, and written to `SHARE-seedN.txt` with one image a line, so that
others can use and cite it. The penalty is chosen by cross-validation inside the few images.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.sources import Images
from .logistic import choose, fit
from .settings import LogisticSettings, LowshotSettings
from .work import Bench, Found, accuracies, by_class, dealt, folds


class Draw(NamedTuple):
    """Few images."""

    share: float
    number: int
    rows: Tensor
    """ascending"""

    @property
    def name(self) -> str:
        return f"{100 * self.share:g}percent-seed{self.number}"


def run(bench: Bench, cfg: LowshotSettings, logistic: LogisticSettings) -> Found:
    """Mean and spread (standard deviation) over the draws of each share; the first share is the headline."""
    draws = [draw(bench.train.labels, share, number) for share in cfg.shares for number in range(cfg.splits)]
    x, classes = bench.train.features["pooled"].to(bench.device), len(bench.classes)

    def one(few: Draw) -> tuple[float, dict[str, float]]:
        rows, strength = few.rows, cfg.strength
        labels = bench.train.labels[rows]
        parts = folds(labels, cfg.folds, bench.seed)
        if parts:
            strength, _ = choose(x[rows], labels, classes, parts, logistic, deal=False)
        found = fit(x[rows], labels, classes, strength, logistic)
        return strength, accuracies(found.predict(bench.test.features["pooled"].to(bench.device)), bench.test.labels)

    results = dealt(draws, one)
    metrics: dict[str, float] = {}
    chosen = {each.name: {"images": len(each.rows), "strength": s} for each, (s, _) in zip(draws, results, strict=True)}
    for share in cfg.shares:
        values = [found for each, (_, found) in zip(draws, results, strict=True) if each.share == share]
        for kind in ("top1", "mean_class"):
            numbers = [value[kind] for value in values]
            name = f"{100 * share:g}%" + ("" if kind == "top1" else f"/{kind}")
            metrics[name] = mean(numbers)
            metrics[f"{name}/spread"] = stdev(numbers) if len(numbers) > 1 else 0.0
    return Found(next(iter(metrics)), metrics, chosen)


def draw(labels: Tensor, share: float, number: int) -> Draw:
    """A share of the images, the same number from every class, at least one."""
    classes = by_class(labels, number)
    each = max(1, round(share * len(labels) / len(classes)))
    return Draw(share, number, torch.cat([rows[:each] for rows in classes]).sort().values)


def write_draws(folder: Path, labels: Tensor, rows: Tensor, source: Images, cfg: LowshotSettings) -> None:
    """One text file for each draw: files by their place inside the data's folder, rows of a table by number.

    Args:
        rows: of the training images, their numbers in `source`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for share in cfg.shares:
        for number in range(cfg.splits):
            few = draw(labels, share, number)
            lines = [_key(source, int(rows[row])) for row in few.rows]
            (folder / f"{few.name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _key(source: Images, i: int) -> str:
    try:
        return source.key(i)
    except ValueError:
        return str(i)
