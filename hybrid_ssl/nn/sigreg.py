"""SIGReg: features are pushed towards a standard normal distribution, tested along random directions.

From LeJEPA (arXiv 2511.08544). Along a direction a the numbers u = z . a should be N(0, 1), whose characteristic
function is exp(-t^2 / 2). The Epps-Pulley statistic compares the empirical one with it, on knots t in [0, 3]:

    statistic = N * 2 * integral of [(mean cos(t u) - exp(-t^2 / 2))^2 + (mean sin(t u))^2] exp(-t^2 / 2) dt

Rows of all processes make one sample: sums of cos and sin are added with gradient, and every process draws the same
directions. Normal rows give about 1.05 whatever N and D are, zeros 0.402 N, with no gradient at all: nothing lifts
features that have collapsed, so the projector before it keeps its BatchNorm. The factor N is the paper's; the weight
of the statistic therefore grows with the batch.
Shapes: V views, N rows on this process, D width, S directions, T knots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .distributed import all_sum, world_size
from .precision import full_precision, no_autocast

_NUMBERS = 2**24  # of cos and sin that are held at a time: 64 MB each; the backward pass computes them again


def random_directions(dim: int, count: int, *key: int) -> Tensor:
    """Unit columns [D, S] from a generator keyed by integers, e.g. (seed, step): the same on every process."""
    generator = torch.Generator().manual_seed(hash(key) & 0x7FFF_FFFF_FFFF_FFFF)
    return F.normalize(torch.randn(dim, count, generator=generator), dim=0)


def sigreg(z: Tensor, directions: Tensor, knots: int = 17, limit: float = 3.0) -> Tensor:
    """Mean statistic over views and directions, a float32 scalar, the same on every process.

    Args:
        z: [N, D] or [V, N, D]; each view is a sample of its own. N is equal on all processes.
        directions: [D, S] unit columns, equal on all processes.
        knots: points of the trapezoid rule on [0, limit].
        limit: largest t.
    """
    with no_autocast(z):  # float32: t * u reaches 10, whose cosine bf16 does not know
        z = full_precision(z if z.ndim == 3 else z.unsqueeze(0))  # [V, N, D]
        directions = directions.to(z)
        t = torch.linspace(0, limit, knots, device=z.device, dtype=z.dtype)
        count = z.shape[1] * world_size()
        chunk = max(1, _NUMBERS // (z.shape[0] * z.shape[1] * knots))
        parts = [
            checkpoint(_wave_sums, z, part, t, use_reentrant=False, preserve_rng_state=False)
            for part in directions.split(chunk, dim=1)
        ]
        cosine, sine = (all_sum(torch.cat(parts, dim=2)) / count).unbind(0)  # [V, S, T] each
        normal = (-t.square() / 2).exp()
        error = (cosine - normal).square() + sine.square()
        return 2 * count * torch.trapezoid(error * normal, t, dim=-1).mean()


def _wave_sums(z: Tensor, directions: Tensor, t: Tensor) -> Tensor:
    """Sums over rows of cos(t u) and sin(t u): [2, V, S, T]."""
    waves = (z @ directions).unsqueeze(-1) * t  # [V, N, S, T]
    return torch.stack((waves.cos().sum(1), waves.sin().sum(1)))
