"""Label maps in colour, and the sheet: image, truth, prediction, with a legend of the classes that are in it.

Colours are given by class number, the same in every picture: twenty that are far apart, then hues by the golden angle.
Class 0 is often the background; it is drawn as all others. Ignored pixels are light gray.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...monitor.pictures import INK, PAPER, Column, font, sheet
from .metrics import IGNORED

_FIRST = (
    "3b4252 e6194b 3cb44b ffe119 4363d8 f58231 911eb4 46f0f0 f032e6 bcf60c "
    "fabebe 008080 e6beff 9a6324 fffac8 800000 aaffc3 808000 ffd8b1 000075"
).split()  # "20 simple, distinct colors", with slate for the first
_UNKNOWN = (216, 220, 226)
_OPACITY = 0.6
_SWATCH, _LINE, _MARGIN = 14, 22, 16


def colours(count: int) -> Tensor:
    """uint8 [count + 1, 3]; the last one is for ignored pixels, so that index -1 finds it."""
    rows = [tuple(bytes.fromhex(text)) for text in _FIRST[:count]]
    for i in range(len(rows), count):
        hue, dark = i * 0.618034 % 1, (i // 7) % 2
        rows.append(tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.85 - 0.3 * dark, 0.95 - 0.35 * dark)))
    return torch.tensor([*rows, _UNKNOWN], dtype=torch.uint8)


def coloured(labels: Tensor) -> Tensor:
    """Class numbers [H, W] (IGNORED: light gray) -> uint8 [3, H, W]."""
    palette = colours(max(1, int(labels.max()) + 1))
    return palette[labels.cpu().long()].permute(2, 0, 1)


def painted(image: Tensor, labels: Tensor) -> Tensor:
    """uint8 [C, H, W] under the colours of its labels: uint8 [3, H, W]. Ignored pixels stay as they are."""
    base = image.cpu()
    base = (base[:3] if len(base) >= 3 else base[:1].expand(3, -1, -1)).float()
    mixed = base + _OPACITY * (coloured(labels).float() - base)
    return torch.where(labels.cpu() == IGNORED, base, mixed).round().to(torch.uint8)


def comparison(
    images: Sequence[Tensor], truths: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str], cell: int = 160
) -> Image.Image:
    """A row for each image, enlarged or reduced to `cell` pixels, and the legend of all classes that appear.

    Args:
        images: uint8 [C, H, W], of any sizes.
        truths, found: class numbers [H, W]; IGNORED only in `truths`.
    """
    known = [truth != IGNORED for truth in truths]
    right = [(f[k] == t[k]).float().mean() for f, t, k in zip(found, truths, known, strict=True) if k.any()]
    share = f"{float(torch.stack(right).mean()):.0%} of these pixels right" if right else "no truth"
    thirds = (
        ("image", "", [_fitted(image, cell) for image in images]),
        ("truth", "light gray: ignored", [_fitted(coloured(truth), cell, smooth=False) for truth in truths]),
        ("prediction", share, [_fitted(coloured(labels), cell, smooth=False) for labels in found]),
    )
    columns = [Column(title, note, torch.stack(pictures)) for title, note, pictures in thirds]
    rows = sheet(columns, len(images), cell, blocks=2 if len(images) > 4 else 1)
    present = torch.cat([labels.flatten().cpu().long() for labels in (*truths, *found)]).unique().tolist()
    return _with_legend(rows, [(k, names[k]) for k in present if k != IGNORED], len(names))


def _fitted(picture: Tensor, cell: int, smooth: bool = True) -> Tensor:
    """[C, H, W] into the middle of a white square of `cell` pixels, as RGB."""
    picture = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    factor = cell / max(picture.shape[-2:])
    size = [max(1, round(side * factor)) for side in picture.shape[-2:]]
    pixels = picture.cpu()[None].float()
    if smooth:
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    else:
        pixels = F.interpolate(pixels, size=size, mode="nearest-exact")
    out = torch.full((3, cell, cell), 255, dtype=torch.uint8)
    top, left = (cell - size[0]) // 2, (cell - size[1]) // 2
    out[:, top : top + size[0], left : left + size[1]] = pixels[0].round().clamp(0, 255).to(torch.uint8)
    return out


def _with_legend(rows: Image.Image, entries: Sequence[tuple[int, str]], count: int) -> Image.Image:
    """The sheet with a line of swatches and names below it, broken where the page ends."""
    palette = colours(count).tolist()
    places, x, y = [], _MARGIN, rows.height
    for number, name in entries:
        width = _SWATCH + 6 + round(font(13).getlength(name)) + 18
        if x > _MARGIN and x + width > rows.width:
            x, y = _MARGIN, y + _LINE
        places.append((x, y, number, name))
        x += width
    page = Image.new("RGB", (rows.width, y + _LINE + _MARGIN // 2), PAPER)
    page.paste(rows, (0, 0))
    draw = ImageDraw.Draw(page)
    for x, y, number, name in places:
        draw.rectangle((x, y, x + _SWATCH, y + _SWATCH), fill=tuple(palette[number]), outline=INK)
        draw.text((x + _SWATCH + 6, y - 1), name, INK, font(13))
    return page
