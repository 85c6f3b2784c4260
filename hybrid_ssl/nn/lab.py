"""Colour without brightness: CIE Lab of sRGB pixels, and bins on its ab plane.

sRGB is a curve, not a light intensity: values are made linear first, then mixed to XYZ, relative to the white of
daylight (D65) that sRGB is defined with (IEC 61966-2-1), then compressed by the cube root (CIE 15). Grays have a = b =
0; with another white they do not. Without the first step saturated colours move by 10 and more units.
Shapes: R rows of colours, Q bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import full_precision, no_autocast

_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_WHITE = (0.95047, 1.0, 1.08883)  # D65
_KNEE = 6 / 29  # below its cube the cube root is replaced by a line
_SIDE = 10.0  # of a bin in units of a and b (arXiv 1603.08511)
_FURTHEST = 110  # of all sRGB colours along a or b: blue, at b = -107.9
_CHUNK = 65_536  # colours compared with all bins at once: 80 MB


def srgb_to_lab(images: Tensor) -> Tensor:
    """sRGB in 0..1 -> L in 0..100, a and b in about -110..110; float [..., 3, H, W] -> at least float32, same shape."""
    with no_autocast(images):
        x = full_precision(images).movedim(-3, -1).clamp(0, 1)
        linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        xyz = linear @ linear.new_tensor(_TO_XYZ).T / linear.new_tensor(_WHITE)
        root = xyz.clamp_min(_KNEE**3) ** (1 / 3)
        f = torch.where(xyz > _KNEE**3, root, xyz / (3 * _KNEE**2) + 4 / 29)
        fx, fy, fz = f.unbind(-1)
        return torch.stack((116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)), dim=-3)


def ab_bins(count: int = 313) -> Tensor:
    """The `count` nodes of the grid of 10 units that are nearest to what sRGB can show: float32 [Q, 2].

    All colours fall into 262 bins. The paper's published list has 313, some of them just outside, so that colours at
    the border have five near bins, too.
    """
    steps = torch.linspace(0, 1, 24, dtype=torch.float64)
    cube = torch.cartesian_prod(steps, steps, steps)  # [24^3, 3]
    shown = srgb_to_lab(cube.T.unsqueeze(-1))[1:, :, 0].T  # [24^3, 2]
    axis = torch.arange(-_FURTHEST, _FURTHEST + 1, _SIDE, dtype=torch.float64)
    nodes = torch.cartesian_prod(axis, axis)
    distance = torch.stack([(shown - node).square().sum(1).min() for node in nodes])
    chosen = distance.argsort(stable=True)[:count].sort().values
    return nodes[chosen].float()


@torch.no_grad()
def soft_bins(colours: Tensor, bins: Tensor, near: int = 5, sigma: float = 5.0) -> tuple[Tensor, Tensor]:
    """The nearest bins of each colour, and their shares by a Gaussian of the distance.

    Args:
        colours: [R, 2], a and b.
        bins: [Q, 2].

    Returns:
        int64 [R, near], nearest first, and float [R, near] that sum to 1.
    """
    found = [torch.cdist(part, bins).topk(near, dim=1, largest=False) for part in colours.split(_CHUNK)]
    distance = torch.cat([each.values for each in found])
    shares = (-distance.square() / (2 * sigma**2)).softmax(dim=1)
    return torch.cat([each.indices for each in found]), shares
