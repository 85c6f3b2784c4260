"""What every tokenizer is: a picture becomes one id for each square of `stride` pixels, and ids become a picture.

The convolutional trunk follows the discrete VAE that BEiT uses (arXiv 2106.08254, section 2.1, after DALL-E, arXiv
2102.12092): each stage halves the picture and has one residual block. Written from the papers. Pixels are in 0..1: a
tokenizer knows nothing of the mean and deviation that an encoder's images are normalised with.

Shapes: B images, C channels, rows x columns squares, N = rows x columns in row-major order, D code width, K codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nn.precision import full_precision, no_autocast
from ..schedule import Progress
from ..settings import Settings


class TokenizerSettings(Settings):
    """Common part of the tokenizers' settings. The defaults suit photographs; small pictures need far fewer codes."""

    channels: int = Field(3, ge=1)
    stride: int = Field(8, ge=1)
    """side of a square in pixels, a power of two; half of the encoder's patch, on half of its picture, gives one id
    for each patch"""
    codes: int = Field(8192, ge=2)
    """K (BEiT: 8192)"""
    dim: int = Field(32, ge=1)
    """D, width of a code"""
    width: int = Field(128, ge=1)
    """channels inside the network"""

    @model_validator(mode="after")
    def _power_of_two(self) -> TokenizerSettings:
        if self.stride & (self.stride - 1):
            raise ValueError(f"a tokenizer halves the picture several times: stride is 2, 4, 8, ..., not {self.stride}")
        return self


class Tokenizer(nn.Module):
    """Base class; a subclass has `score` and `loss`."""

    kind: Literal["vq", "dvae"]
    codes: Tensor
    """[K, D]"""

    def __init__(self, settings: TokenizerSettings, features: int) -> None:
        super().__init__()
        self.settings: Any = settings  # each subclass has its own
        self.encoder = encoder(settings, features)
        self.decoder = decoder(settings)

    def score(self, images: Tensor) -> Tensor:
        """How well each code fits each square: [B, C, H, W] in 0..1 -> [B, K, rows, columns]."""
        raise NotImplementedError

    def loss(self, images: Tensor, now: Progress, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """What training minimises, and the ids that were met [n]; all randomness comes from `draw`."""
        raise NotImplementedError

    @torch.no_grad()
    def ids(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in 0..1 -> int64 [B, N], always in full precision: ties of an argmax fall apart in bf16."""
        with no_autocast(images):
            return self.score(full_precision(images)).argmax(dim=1).flatten(1)

    @torch.no_grad()
    def decode(self, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """int64 [B, N] -> pictures [B, C, H, W], in 0..1."""
        rows = self.codes[ids].transpose(1, 2).unflatten(2, grid)  # [B, D, rows, columns]
        pictures: Tensor = self.decoder(rows)
        return pictures.clamp(0, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of squares.

        Raises:
            ValueError: the size is no multiple of the stride.
        """
        s = self.settings.stride
        if height % s or width % s:
            raise ValueError(f"pictures of {height} x {width} pixels have no whole number of squares of {s} pixels")
        return height // s, width // s


class Residual(nn.Module):
    """Two 3 x 3 convolutions and a 1 x 1, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out


def encoder(settings: TokenizerSettings, features: int) -> nn.Sequential:
    """[B, C, H, W] -> [B, features, rows, columns]."""
    layers: list[nn.Module] = []
    width = settings.channels
    for _ in range(_stages(settings)):
        layers += [nn.Conv2d(width, settings.width, 4, stride=2, padding=1), nn.ReLU(), Residual(settings.width)]
        width = settings.width
    return nn.Sequential(*layers, nn.Conv2d(width, features, 1))


def decoder(settings: TokenizerSettings) -> nn.Sequential:
    """[B, D, rows, columns] -> [B, C, H, W]."""
    layers: list[nn.Module] = [nn.Conv2d(settings.dim, settings.width, 1)]
    for _ in range(_stages(settings)):
        layers += [
            Residual(settings.width),
            nn.ConvTranspose2d(settings.width, settings.width, 4, stride=2, padding=1),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(settings.width, settings.channels, 1))


def _stages(settings: TokenizerSettings) -> int:
    return settings.stride.bit_length() - 1
