"""Many heads trained on one stream of features; the best one is chosen on held-out training images.

Heads do not know of each other, so what one learns is the same alone, beside others and on any number of processes.
The winner is trained again on all training images, and only then are test labels looked at.

Shapes: b images of a batch, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...nn.distributed import gather_objects, rank, world_size
from ...optim import OptimizerSettings, build_optimizer, param_groups, peak_lr, set_step
from ...schedule import Progress
from .feed import Feed, progress, testing_plan, training_plan
from .progress import Bar
from .work import Bench, Parts, top1

Choice = TypeVar("Choice")
_TESTED = 256  # images of a forward pass of heads


class Head:
    """A classifier on features, with its optimizer.

    Args:
        module: features by name -> logits [b, C].
        cfg: the optimizer; its schedule runs over the plan.
        batch_size: images of a step, for the learning rate.
    """

    def __init__(self, module: nn.Module, cfg: OptimizerSettings, batch_size: int, device: torch.device) -> None:
        self.module, self.cfg = module.to(device), cfg
        self.peak, _ = peak_lr(cfg, batch_size)
        self.optimizer = build_optimizer(cfg, param_groups(cfg, module.named_parameters()))

    def step(self, features: dict[str, Tensor], labels: Tensor, now: Progress) -> None:
        """One optimizer step."""
        set_step(self.cfg, self.optimizer, self.peak, now)
        self.module.train()
        loss = cross_entropy(self.module(features), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Classes: int64 [b]."""
        answers: Tensor = self.module.eval()(features).argmax(1)
        return answers


class Trial(NamedTuple):
    """How heads are trained and tried."""

    train: Feed
    """what they learn from"""
    held: Feed
    """training images as they are tested"""
    test: Feed
    epochs: int
    batch_size: int


class Winner(NamedTuple):
    """The choice with most right answers on held-out images."""

    choice: Any
    share: float
    """of right answers there"""
    predicted: Tensor
    """int64 [m] on the CPU, of the test images, after training on all"""


def compete(
    bench: Bench, build: Callable[[Choice], Head], choices: Sequence[Choice], trial: Trial, parts: Parts, what: str
) -> Winner:
    """Train a head for every choice on `parts.fit`, choose on `parts.held`, train the winner on everything; the first
    of equals wins."""
    mine = [build(choice) for choice in choices[rank() :: world_size()]]
    _train(bench, mine, trial, parts.fit, f"{what}: steps of {len(choices)} heads")
    labels = bench.train.labels[parts.held]
    shares = [top1(each, labels) for each in _predict(mine, trial.held, parts.held)]
    by_rank = gather_objects(shares)
    dealt = [by_rank[i % world_size()][i // world_size()] for i in range(len(choices))]
    best = dealt.index(max(dealt))
    final = [build(choices[best])] if rank() == 0 else []
    _train(bench, final, trial, torch.arange(len(bench.train.labels)), f"{what}: steps of the winner")
    predicted = _predict(final, trial.test, torch.arange(len(bench.test.labels)))
    return Winner(choices[best], dealt[best], gather_objects(predicted)[0][0])


def _train(bench: Bench, heads: Sequence[Head], trial: Trial, rows: Tensor, what: str) -> None:
    plan = training_plan(rows, trial.epochs, trial.batch_size, bench.seed)
    with Bar(what, len(plan), bench.say) as bar:
        for number, (step, features) in enumerate(zip(plan, trial.train(plan), strict=True)):
            now, labels = progress(plan, number), bench.train.labels[step.rows].to(bench.device)
            for head in heads:
                head.step(features, labels, now)
            bar.move(number + 1)


def _predict(heads: Sequence[Head], feed: Feed, rows: Tensor) -> list[Tensor]:
    """Classes of the rows by each head."""
    found: list[list[Tensor]] = [[] for _ in heads]
    for features in feed(testing_plan(rows, _TESTED)):
        for head, answers in zip(heads, found, strict=True):
            answers.append(head.predict(features).cpu())
    return [torch.cat(answers) for answers in found]


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose random weights depend on nothing but the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
