"""Linear probes as the papers train them: DINO's and DINOv2's sweep, and MAE's BatchNorm with LARS.

`sweep` (DINO, arXiv 2104.14294; DINOv2, 2304.07193): a linear layer on the class tokens of the last 1 or 4 blocks side
by side, with or without the mean of the patch tokens, SGD with momentum 0.9, no weight decay, cosine schedule; every
learning rate on every kind of features is a head, and all learn from one stream. `mae` (arXiv 2111.06377):
BatchNorm without affine part in front of the layer, LARS, linear warm-up, on what the encoder gives.

Where we differ: the papers train on random crops and report the head that is best on the test images. Here features
are those of centre crops unless `augment` is set, and the head is chosen on held-out training images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...optim import OptimizerSettings
from .feed import Feed, Live, Stored
from .heads import Head, Trial, Winner, compete, seeded
from .settings import LinearSettings
from .work import Bench, Found, accuracies, held_out


class Choice(NamedTuple):
    """What may be chosen of a head."""

    names: tuple[str, ...]
    """of features"""
    lr: float
    """for 256 images"""


class Linear(nn.Module):
    """A linear layer on features side by side, behind a BatchNorm without affine part if asked for."""

    def __init__(self, names: tuple[str, ...], dim: int, classes: int, batchnorm: bool) -> None:
        super().__init__()
        self.names = names
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batchnorm else nn.Identity()
        self.head = nn.Linear(dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)  # as DINO, DINOv2 and MAE
        nn.init.zeros_(self.head.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        joined = "+".join(self.names)
        if joined not in features:  # put side by side once for all heads that read them
            features[joined] = torch.cat([features[name] for name in self.names], 1)
        logits: Tensor = self.head(self.norm(features[joined]))
        return logits


def run(bench: Bench, cfg: LinearSettings, live: Live) -> Found:
    """Accuracy of each kind of probe; the first kind is the headline.

    Args:
        live: the encoder over random crops of the training images, used with `augment`.
    """
    metrics: dict[str, float] = {}
    chosen: dict[str, Any] = {}
    for kind in dict.fromkeys(cfg.kinds):
        choices = _sweep(bench, cfg) if kind == "sweep" else [Choice(("pooled",), lr) for lr in cfg.mae.lrs]
        winner = _compete(bench, cfg, kind, choices, live)
        found = accuracies(winner.predicted, bench.test.labels)
        metrics |= (found if not metrics else {}) | {f"{kind}/{name}": value for name, value in found.items()}
        chosen[kind] = {"features": "+".join(winner.choice.names), "lr": winner.choice.lr, "held_out": winner.share}
    return Found("top1", metrics, chosen)


def _sweep(bench: Bench, cfg: LinearSettings) -> list[Choice]:
    """Every learning rate on every kind of features that the encoder has."""
    have = bench.train.features
    depth = sum(name.startswith("block") and name[5:].isdigit() for name in have)
    kinds: list[tuple[str, ...]] = []
    for blocks in dict.fromkeys(min(blocks, depth) for blocks in cfg.sweep.blocks):
        for avgpool in cfg.sweep.avgpool:
            names = tuple(f"block{i}" for i in range(1, blocks + 1)) + (("avg",) if avgpool and "avg" in have else ())
            kinds.append(names)
    return [Choice(names, lr) for names in dict.fromkeys(kinds) for lr in cfg.sweep.lrs]


def _compete(bench: Bench, cfg: LinearSettings, kind: str, choices: list[Choice], live: Live) -> Winner:
    section = cfg.sweep if kind == "sweep" else cfg.mae
    images = min(section.batch_size, len(bench.train.labels))

    def build(choice: Choice) -> Head:
        dim = sum(bench.train.features[name].shape[1] for name in choice.names)
        module = seeded(lambda: Linear(choice.names, dim, len(bench.classes), kind == "mae"), bench.seed)
        if kind == "sweep":
            optimizer = OptimizerSettings(name="sgd", lr=choice.lr, weight_decay=0.0)
        else:
            optimizer = OptimizerSettings(
                name="lars", lr=choice.lr, weight_decay=0.0, warmup=f"{cfg.mae.warmup} epochs"
            )
        return Head(module, optimizer, images, bench.device)

    names = sorted({name for choice in choices for name in choice.names})
    centre: Feed = Stored(bench.train, names, bench.device)
    test: Feed = Stored(bench.test, names, bench.device)
    trial = Trial(live if cfg.augment else centre, centre, test, section.epochs, section.batch_size)
    return compete(
        bench, build, choices, trial, held_out(bench.train.labels, cfg.held_out, bench.seed), f"linear {kind}"
    )
