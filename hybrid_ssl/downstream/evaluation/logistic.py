"""Logistic regression on frozen features by L-BFGS, with an L2 penalty that is chosen on held-out training images.

minimise over W, b:   mean over images of cross-entropy(W x + b, class)  +  strength / 2 x |W|^2

The bias is free. Features are centred and divided by one number, the root of their mean square: neither changes the
problem except for the meaning of `strength`, which then is the same for encoders of any scale. The gradient is
written out and summed in chunks of images, so that the logits of ImageNet need not fit into memory.

Shapes: n images, D width, C classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .settings import LogisticSettings
from .work import Bench, Found, Parts, accuracies, dealt, held_out, top1

_LOGITS = 2**24  # logits held at once: 128 MiB of float64


class Classifier(NamedTuple):
    """A linear classifier with the scaling of its features."""

    mean: Tensor
    """[D]"""
    scale: Tensor
    """scalar"""
    weight: Tensor
    """[C, D]"""
    bias: Tensor
    """[C]"""

    def logits(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, C]"""
        return ((x.to(self.weight) - self.mean) / self.scale) @ self.weight.T + self.bias

    def predict(self, x: Tensor) -> Tensor:
        """[n, D] -> int64 [n] on the CPU"""
        step = max(1, _LOGITS // len(self.bias))
        return torch.cat([self.logits(part).argmax(1).cpu() for part in x.split(step)])


def run(bench: Bench, cfg: LogisticSettings) -> Found:
    """Choose the strength, fit all training images, test."""
    train, labels = bench.train.features["pooled"].to(bench.device), bench.train.labels
    strength, shares = choose(train, labels, len(bench.classes), [held_out(labels, cfg.held_out, bench.seed)], cfg)

    def final(_: None) -> Tensor:
        found = fit(train, labels, len(bench.classes), strength, cfg)
        return found.predict(bench.test.features["pooled"].to(bench.device))

    (predicted,) = dealt([None], final)
    chosen = {"strength": strength, "held_out": {f"{s:g}": share for s, share in shares.items()}}
    return Found("top1", accuracies(predicted, bench.test.labels), chosen)


def choose(
    x: Tensor, labels: Tensor, classes: int, parts: list[Parts], cfg: LogisticSettings, deal: bool = True
) -> tuple[float, dict[float, float]]:
    """The strength with most right answers on the parts held out, the stronger one of equals; and each one's share.

    Args:
        deal: deal the strengths out to processes; False inside work that is dealt out already.
    """

    def share(strength: float) -> float:
        right = 0.0
        for part in parts:
            found = fit(x[part.fit], labels[part.fit], classes, strength, cfg)
            right += top1(found.predict(x[part.held]), labels[part.held]) * len(part.held)
        return right / sum(len(part.held) for part in parts)

    strengths = sorted(set(cfg.strengths), reverse=True)
    shares = dealt(strengths, share) if deal else [share(strength) for strength in strengths]
    return strengths[shares.index(max(shares))], dict(zip(strengths, shares, strict=True))


def fit(x: Tensor, labels: Tensor, classes: int, strength: float, cfg: LogisticSettings) -> Classifier:
    """The minimum of the objective above for [n, D] features and int64 [n] labels."""
    dtype = torch.float64 if cfg.precision == "float64" else torch.float32
    x = x.to(dtype)
    mean = x.mean(0)
    x = x - mean
    scale = x.square().mean().sqrt().clamp_min(torch.finfo(dtype).tiny)  # equal features stay zeros
    x = x / scale
    labels = labels.to(x.device)
    weight, bias = (torch.zeros(*shape, dtype=dtype, device=x.device) for shape in ((classes, x.shape[1]), (classes,)))
    exact = dtype == torch.float64
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=cfg.iterations,
        max_eval=2 * cfg.iterations,
        tolerance_grad=1e-7 if exact else 1e-5,  # of the largest component; predictions stand long before
        tolerance_change=1e-12 if exact else 1e-8,  # of the loss: what separates perfectly never ends
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:
        loss, weight.grad, bias.grad = objective(x, labels, weight, bias, strength)
        return loss

    solver.step(closure)
    return Classifier(mean, scale, weight, bias)


@torch.no_grad()
def objective(
    x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, and its gradients for weight and bias."""
    loss = strength / 2 * weight.square().sum()
    grad_weight, grad_bias = strength * weight, torch.zeros_like(bias)
    step = max(1, _LOGITS // len(bias))
    for part, wanted in zip(x.split(step), labels.split(step), strict=True):
        log_p = (part @ weight.T + bias).log_softmax(1)  # [n, C]
        loss = loss - log_p.gather(1, wanted[:, None]).sum() / len(x)
        error = log_p.exp()
        error[torch.arange(len(part), device=x.device), wanted] -= 1
        grad_weight = grad_weight + error.T @ part / len(x)
        grad_bias = grad_bias + error.sum(0) / len(x)
    return loss, grad_weight, grad_bias
