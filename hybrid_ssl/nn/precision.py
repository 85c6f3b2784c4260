"""Where half precision ends: losses, softmax, statistics and targets are computed in float32 at least.

Heads run in whatever autocast surrounds them. What comes after enters `no_autocast` and passes through
`full_precision`, so that it is float32 under bf16 or fp16 and stays float64 in tests.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """float32, or float64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> torch.autocast:
    """A context on the device of `x` in which nothing is cast down."""
    return torch.autocast(x.device.type, enabled=False)


def for_weight(x: Tensor, weight: Tensor) -> Tensor:
    """`x` as a matrix product with `weight` can read it: autocast casts by itself, else the weight's type counts."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
