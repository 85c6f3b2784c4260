"""What every contestant has to do: the sizes, and the same inputs for all.

Shapes: B images, T = 2 global and L local crops, N patches. Crops are stacked view-major, masks are True where hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

METHODS = ("mae", "simmim", "moco_v3", "dino", "ibot")
PRECISIONS = ("bf16", "fp32")
Precision = Literal["bf16", "fp32"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
HIDDEN = {"mae": 0.75, "simmim": 0.6, "ibot": 0.3}  # the papers' ratios; iBOT: the mean of its masked crops
MOMENTUM = 0.996


@dataclass(frozen=True)
class Size:
    """Widths, crops and batch of a comparison. The defaults are ViT-S/16 and the papers' heads."""

    dim: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    side: int = 224
    local_side: int = 96
    locals: int = 4
    """small crops of DINO and iBOT; fewer than the papers' 8 to 10, for time"""
    batch: int = 8
    """images of MAE and SimMIM; the methods with many crops take half as many"""
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    moco_hidden: int = 4096
    moco_dim: int = 256
    head_hidden: int = 2048
    bottleneck: int = 256
    dino_prototypes: int = 65536
    ibot_prototypes: int = 8192


FULL = Size()
QUICK = Size(
    dim=96,
    depth=2,
    heads=3,
    side=96,
    local_side=48,
    locals=2,
    batch=4,
    decoder_dim=64,
    decoder_depth=1,
    decoder_heads=4,
    moco_hidden=256,
    moco_dim=64,
    head_hidden=256,
    bottleneck=64,
    dino_prototypes=2048,
    ibot_prototypes=1024,
)


@dataclass(frozen=True)
class Work:
    """One method at one size and precision, with its inputs."""

    method: str
    precision: Precision = "bf16"
    size: Size = FULL

    @property
    def images(self) -> int:
        """B"""
        return self.size.batch if self.method in ("mae", "simmim") else max(2, self.size.batch // 2)

    @property
    def grid(self) -> int:
        return self.size.side // self.size.patch

    @cached_property
    def raw(self) -> dict[str, Tensor]:
        """View -> uint8 [V*B, 3, H, W]: what our loader moves to the device."""
        shapes = {"plain": (1, self.size.side)}
        if self.method not in ("mae", "simmim"):
            shapes = {"global": (2, self.size.side)}
        if self.method in ("dino", "ibot"):
            shapes["local"] = (self.size.locals, self.size.local_side)
        draw = torch.Generator().manual_seed(0)
        return {
            name: torch.randint(256, (crops * self.images, 3, side, side), generator=draw, dtype=torch.uint8)
            for name, (crops, side) in shapes.items()
        }

    @cached_property
    def views(self) -> dict[str, Tensor]:
        """View -> normalised float [V*B, 3, H, W]: what other libraries' loaders give."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (MEAN, STD))
        return {name: (images - mean) / std for name, images in self.raw.items()}

    @cached_property
    def mask(self) -> Tensor | None:
        """[V*B, N] bool with the same number hidden in each row, for the methods that mask."""
        if self.method not in HIDDEN:
            return None
        rows, patches = len(next(iter(self.raw.values()))), self.grid**2
        visible = int(patches * (1 - HIDDEN[self.method]) + 1e-9)
        draw = torch.Generator().manual_seed(1)
        return torch.rand(rows, patches, generator=draw).argsort(dim=1) >= visible


class Trainer(Protocol):
    """A model in training. One step is `forward_backward`, then `update`."""

    def forward_backward(self) -> Tensor:
        """The loss, after its gradients were computed."""

    def update(self) -> None:
        """Optimizer and teacher; gradients are gone afterwards."""


def autocast(precision: Precision) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
