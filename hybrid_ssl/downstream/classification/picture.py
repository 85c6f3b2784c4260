"""A sheet of test images with answer and truth, and beside it what is taken for what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...monitor.pictures import FAINT, INK, PAPER, font

_CELL, _TEXT, _GAP, _MARGIN, _COLUMNS = 112, 32, 10, 16, 6
_RIGHT, _WRONG = "#138a63", "#c0392b"
_MOST = 30  # classes of which a table can be read
_SQUARE = 26  # pixels of its cells


def answer_sheet(
    pictures: Tensor, labels: Sequence[int], probabilities: Tensor, classes: Sequence[str], confusion: Tensor | None
) -> Image.Image:
    """Draw it.

    Args:
        pictures: uint8 [B, C, H, W].
        labels: the truth.
        probabilities: [B, K].
        classes: K names.
        confusion: int64 [K, K], truth by answer, or None; drawn for up to 30 classes.
    """
    rows = -(-len(pictures) // _COLUMNS)
    width = _COLUMNS * (_CELL + _GAP) - _GAP + 2 * _MARGIN
    height = rows * (_CELL + _TEXT + _GAP) - _GAP + 2 * _MARGIN
    table = None if confusion is None or len(classes) > _MOST else confusion_table(confusion, classes)
    size = (width + (table.width if table else 0), max(height, table.height if table else 0))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    for i, picture in enumerate(pictures):
        x = _MARGIN + i % _COLUMNS * (_CELL + _GAP)
        y = _MARGIN + i // _COLUMNS * (_CELL + _TEXT + _GAP)
        page.paste(_image(picture), (x, y))
        best = int(probabilities[i].argmax())
        right = best == labels[i]
        answer = f"{classes[best]} {float(probabilities[i, best]):.0%}"
        draw.text((x, y + _CELL + 2), _short(answer, 12), _RIGHT if right else _WRONG, font(12))
        draw.text((x, y + _CELL + 17), _short(f"is {classes[labels[i]]}", 11), FAINT, font(11))
    if table is not None:
        page.paste(table, (width, 0))
    return page


def confusion_table(confusion: Tensor, classes: Sequence[str]) -> Image.Image:
    """Rows: the truth; columns: the answer; each row in shares of its images, printed in percent."""
    count = len(classes)
    letters = round(max(font(12).getlength(name) for name in classes)) + 8
    left, top = _MARGIN + letters, _MARGIN + 24 + letters
    page = Image.new("RGB", (left + count * _SQUARE + _MARGIN, top + count * _SQUARE + _MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), "truth (rows), answer (columns), %", INK, font(12))
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    for row, name in enumerate(classes):
        draw.text((left - 6, top + (row + 0.5) * _SQUARE), name, INK, font(12), anchor="rm")
        strip = Image.new("RGB", (letters, 16), PAPER)
        ImageDraw.Draw(strip).text((0, 8), name, INK, font(12), anchor="lm")
        page.paste(strip.rotate(90, expand=True), (left + row * _SQUARE + 5, top - letters - 2))
        for column in range(count):
            share = float(shares[row, column])
            x, y = left + column * _SQUARE, top + row * _SQUARE
            draw.rectangle((x, y, x + _SQUARE - 2, y + _SQUARE - 2), _tint(share, row == column))
            if share >= 0.005:
                ink = PAPER if share > 0.55 else INK
                draw.text((x + _SQUARE / 2 - 1, y + _SQUARE / 2 - 1), f"{100 * share:.0f}", ink, font(11), anchor="mm")
    return page


def _image(picture: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> RGB, a square cell; other numbers of channels show their first one or three."""
    pixels = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _short(text: str, size: int) -> str:
    """As much of a text as fits below a picture."""
    while len(text) > 4 and font(size).getlength(text) > _CELL:
        text = text[:-2] + "\u2026"
    return text


def _tint(share: float, right: bool) -> tuple[int, int, int]:
    """From pale gray to green on the diagonal, to red elsewhere."""
    full = (19, 138, 99) if right else (192, 57, 43)
    mixed = torch.tensor([243.0, 244.0, 246.0]).lerp(torch.tensor(full, dtype=torch.float), share)
    red, green, blue = mixed.round().int().tolist()
    return red, green, blue
