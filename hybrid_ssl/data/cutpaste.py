"""Defects for CutPaste: a part of a picture is cut out, changed in colour a little, and pasted elsewhere in it.

Source: Li, Sohn, Yoon, Pfister, "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", arXiv
2104.04015. `patch`: a rectangle of 2 to 15 % of the area; its aspect is drawn wide or high first and then within
that half, because a uniform draw from 0.3 .. 3.3 would make three of four patches wide. `scar`: a thin one, turned by
up to 45 degrees without interpolation. The paper gives the scar's sides in pixels of a 256-pixel picture; here they
grow with the picture. Pictures are uint8 [C, H, W] at both ends; every number comes from a keyed generator.
"""

from __future__ import annotations

import math
from random import Random
from typing import Literal

import torch
from torch import Tensor

from .colour import apply_colour, draw_colour
from .settings import JitterSettings, ViewSettings

_AREA = (0.02, 0.15)  # share of the picture; section 3.1 of the paper
_ASPECT = ((0.3, 1.0), (1.0, 3.3))
_SCAR_WIDTH, _SCAR_LENGTH = (2, 16), (10, 25)  # pixels of a picture with sides of 256
_SIDE = 256
_SCAR_TURN = 45.0  # degrees to either side
_JITTER = ViewSettings(jitter=JitterSettings(p=1.0, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1))


def plant(
    kind: Literal["none", "patch", "scar"], picture: Tensor, rng: Random, jitter: Literal["fast", "exact"]
) -> Tensor:
    """The picture with one defect of this kind; `none`: the picture itself."""
    if kind == "none":
        return picture
    height, width = _patch_sides(picture, rng) if kind == "patch" else _scar_sides(picture, rng)
    top, left = _place(picture, height, width, rng)
    piece = picture[:, top : top + height, left : left + width].contiguous()
    piece = apply_colour(piece, draw_colour(_JITTER, 0, rng), 0.5, jitter)
    shape = torch.ones(height, width, dtype=torch.bool)
    if kind == "scar":
        piece, shape = turn(piece, (2 * rng.random() - 1) * _SCAR_TURN)
    top, left = _place(picture, shape.shape[0], shape.shape[1], rng)
    out = picture.clone()
    under = out[:, top : top + shape.shape[0], left : left + shape.shape[1]]
    under.copy_(torch.where(shape, piece, under))
    return out


def turn(piece: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Turn about the centre, by nearest pixels: [C, h, w] -> the box around it [C, H, W], and where in it, bool."""
    height, width = piece.shape[-2:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = math.ceil(height * abs(cosine) + width * abs(sine) - 1e-9)
    columns = math.ceil(height * abs(sine) + width * abs(cosine) - 1e-9)
    y = (torch.arange(rows) - (rows - 1) / 2).unsqueeze(1)
    x = (torch.arange(columns) - (columns - 1) / 2).unsqueeze(0)
    source_y = (cosine * y + sine * x + (height - 1) / 2).round().long()
    source_x = (cosine * x - sine * y + (width - 1) / 2).round().long()
    inside = (0 <= source_y) & (source_y < height) & (0 <= source_x) & (source_x < width)
    return piece[:, source_y.clamp(0, height - 1), source_x.clamp(0, width - 1)], inside


def _patch_sides(picture: Tensor, rng: Random) -> tuple[int, int]:
    height, width = picture.shape[-2:]
    area = height * width * _uniform(rng, _AREA)
    aspect = _uniform(rng, _ASPECT[rng.random() < 0.5])  # width over height
    sides = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    return min(max(1, sides[0]), height), min(max(1, sides[1]), width)


def _scar_sides(picture: Tensor, rng: Random) -> tuple[int, int]:
    scale = min(picture.shape[-2:]) / _SIDE
    width, length = _uniform(rng, _SCAR_WIDTH), _uniform(rng, _SCAR_LENGTH)
    return max(2, round(length * scale)), max(1, round(width * scale))


def _place(picture: Tensor, height: int, width: int, rng: Random) -> tuple[int, int]:
    """Top and left of a box of this size, uniform over all places within the picture."""
    free_rows, free_columns = picture.shape[-2] - height + 1, picture.shape[-1] - width + 1
    return int(rng.random() * free_rows), int(rng.random() * free_columns)


def _uniform(rng: Random, ends: tuple[float, float]) -> float:
    return ends[0] + (ends[1] - ends[0]) * rng.random()
