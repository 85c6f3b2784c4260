"""Numbers that describe features without labels: do they differ between images, and in how many directions?

No single one sees every failure. When all images get one feature, the normalised std falls to 0 while the centred rank
of the leftover noise stays high; when features differ along few directions only, the rank falls and the std does not.
Measure the same images each time and compare within a run: all of them depend on N and D.

Shapes: Z [N, D] features of N images. Everything is computed in float64 on the CPU, since the small end of a spectrum
is what is asked for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Slope(NamedTuple):
    """A power law fitted to a spectrum."""

    alpha: float
    r2: float
    """share of the variance that the fit explains; below about 0.9 alpha means little"""


def feature_std(z: Tensor) -> float:
    """sqrt(D) * mean_j std_i(z_ij / |z_i|): 1 for isotropic features, 0 when all images get the same one.

    The collapse measure of SimSiam (arXiv 2011.10566, figure 2), scaled so that it does not depend on the width.
    """
    unit = _unit(z)
    return math.sqrt(z.shape[1]) * unit.std(dim=0).mean().item()


def rankme(z: Tensor, centred: bool = False, eps: float = 1e-7) -> float:
    """Effective rank exp(-sum p ln p) of Z's singular values, p = sigma / sum(sigma) + eps (RankMe, arXiv 2210.02885).

    Raw: 1 when features share one direction, so it sees collapse to a point. Centred: the rank of the differences.
    At most min(N, D), and biased low unless N >= 4 D or so.
    """
    sigma = _eigenvalues(z, centred).sqrt()
    total = sigma.sum()
    p = (sigma / total if total > 0 else sigma) + eps
    return (-(p * p.log()).sum()).exp().item()


def alpha_req(z: Tensor) -> Slope:
    """Decay exponent of the covariance spectrum, lambda_j ~ j^-alpha (alpha-ReQ, OpenReview ii9X4vtZGTZ).

    Features that transfer well tend to be near 1; larger means few directions carry all. The line is fitted to the
    logarithms of the first half of the spectrum without its first two values, and only down to 1e-10 of the largest;
    NaN when fewer than 4 values are left.
    """
    spectrum = _eigenvalues(z, centred=True)
    spectrum = spectrum[2 : max(6, len(spectrum) // 2)]
    spectrum = spectrum[spectrum > 1e-10 * spectrum.max()] if len(spectrum) else spectrum
    if len(spectrum) < 4:
        return Slope(math.nan, math.nan)
    x = torch.arange(3, 3 + len(spectrum), dtype=torch.float64).log()
    y = spectrum.log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / (x * x).sum()
    return Slope(-slope.item(), (slope**2 * (x * x).sum() / (y * y).sum()).item())


def mean_cosine(z: Tensor) -> float:
    """Average cosine of two different images: 0 for isotropic features, 1 after collapse to a point."""
    total = _unit(z).sum(dim=0).square().sum().item()  # sum over all pairs = |sum of unit vectors|^2
    return (total - len(z)) / (len(z) * (len(z) - 1))


def paired_cosine(a: Tensor, b: Tensor) -> float:
    """Average cosine of what two encoders of one width say about the same image: 1 while nothing is forgotten."""
    return (_unit(a) * _unit(b)).sum(dim=1).mean().item()


def linear_cka(a: Tensor, b: Tensor) -> float:
    """How alike two encoders arrange the same images: 1 up to rotation and scale, 0 for unrelated ones.

    Linear CKA (arXiv 1905.00414) with the unbiased HSIC (Song et al., JMLR 2012; arXiv 2010.15327): the
    plain one gives unrelated features of 768 numbers 0.4 on 1024 images. NaN for fewer than 4 images or equal features.
    """
    if len(a) < 4:
        return math.nan
    grams = [z @ z.T for z in (_double(a), _double(b))]
    for gram in grams:
        gram.fill_diagonal_(0)
    own = _hsic(grams[0], grams[0]) * _hsic(grams[1], grams[1])
    return _hsic(*grams) / math.sqrt(own) if own > 0 else math.nan


def feature_stats(z: Tensor) -> dict[str, float]:
    """What a probe reports: `std`, `rank` and `rank_centred`."""
    return {"std": feature_std(z), "rank": rankme(z), "rank_centred": rankme(z, centred=True)}


def _hsic(k: Tensor, m: Tensor) -> float:
    """n (n - 3) times the unbiased estimate, from [n, n] Gram matrices whose diagonals are 0."""
    n, rows, columns = len(k), k.sum(0), m.sum(0)
    both = (k * m).sum() + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ columns)
    return both.item()


def _double(z: Tensor) -> Tensor:
    if z.ndim != 2 or len(z) < 2:
        raise ValueError(f"feature statistics need [N, D] with N >= 2 images, got {tuple(z.shape)}")
    return z.detach().cpu().double()  # on the CPU: some accelerators have no float64


def _unit(z: Tensor) -> Tensor:
    return normalize(_double(z), dim=1)


def _eigenvalues(z: Tensor, centred: bool) -> Tensor:
    """Squared singular values of Z, falling, from the smaller Gram matrix: N D min(N, D) instead of an SVD."""
    z = _double(z)
    z = z - z.mean(dim=0) if centred else z
    gram = z.T @ z if z.shape[1] <= len(z) else z @ z.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
