"""Sums and gathers over processes, with or without gradient. One process: everything is the identity.

Gradients. DDP averages parameter gradients over W processes. `gather` and `all_sum` send the *sum* of the incoming
gradients of all processes back. With that, both kinds of loss come out exact: a loss that is a mean over the local
rows (its average over processes is the global mean), and a loss that is the same global number everywhere (W times the
gradient, divided by W). `torch.distributed.all_reduce` inside a graph is invisible to autograd and gives 1/W of it.

Gathers keep rank order: row i of rank r becomes row r * B + i. B must be the same on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes W; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in 0..W-1; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """All processes' rows in rank order, [B, ...] -> [W*B, ...], with gradients to every process."""
    return _Gather.apply(x) if world_size() > 1 else x


def gather_no_grad(x: Tensor) -> Tensor:
    """All processes' rows in rank order, [B, ...] -> [W*B, ...], as constants (targets, queues)."""
    return _gather(x.detach()) if world_size() > 1 else x.detach()


def gather_objects(value: Any) -> list[Any]:
    """Anything that can be pickled, of all processes in rank order; small things only."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def all_sum(x: Tensor) -> Tensor:
    """Sum of `x` over processes, a new tensor, with gradients to every process."""
    return _AllSum.apply(x) if world_size() > 1 else x


def all_sum_no_grad(x: Tensor) -> Tensor:
    """Sum of `x` over processes, as a constant. Never changes `x`."""
    return _reduce(x.detach(), dist.ReduceOp.SUM) if world_size() > 1 else x.detach()


def all_max_no_grad(x: Tensor) -> Tensor:
    """Maximum of `x` over processes, as a constant. Never changes `x`."""
    return _reduce(x.detach(), dist.ReduceOp.MAX) if world_size() > 1 else x.detach()


def ragged_mean(values: Tensor) -> Tensor:
    """The mean over the rows of all processes, which may have other numbers of them; no rows at all: 0.

    [n] -> scalar: this process's sum x W / global n, whose average over processes, as DDP takes it, is the mean.
    """
    count = all_sum_no_grad(values.new_full((), len(values)))
    return values.sum() * (world_size() / count.clamp(min=1))


def _gather(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.14
    all_gather(out, x.contiguous())
    return out


def _reduce(x: Tensor, op: Any) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = _reduce(grads[0], dist.ReduceOp.SUM)
        return total.narrow(0, rank() * ctx.rows, ctx.rows)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduce(x, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _reduce(grads[0], dist.ReduceOp.SUM)
