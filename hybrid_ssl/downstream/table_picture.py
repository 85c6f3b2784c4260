"""The table of results as a picture: a row for each comparison, a column for each kind of weights, bars for means."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ..monitor.pictures import FAINT, INK, PAPER, font
from .tables import KINDS, Row, Table, number_text

_FINE = 2  # drawn this much larger, then reduced: smooth lines
_LABEL, _CELL, _HEIGHT, _TOP, _MARGIN = 330, 210, 62, 44, 16
_RULE, _FADED = "#e6e9ec", "#eef1f4"
_COLOURS = {"random": "#9aa3ab", "pretrained": "#0b6fb8", "public": "#d1661a"}


def draw_table(table: Table) -> Image.Image:
    """Headline numbers of all rows; a bar ends at the mean, of 0..1 or of the row's largest."""
    columns = _columns(table)
    width = _LABEL + _CELL * len(columns) + 2 * _MARGIN
    height = _TOP + _HEIGHT * len(table.rows) + 2 * _MARGIN
    page = _Page(width, height)
    for i, (kind, _) in enumerate(columns):
        page.text((_MARGIN + _LABEL + i * _CELL, _MARGIN + 16), kind, INK, 14)
    for number, row in enumerate(table.rows):
        y = _MARGIN + _TOP + number * _HEIGHT
        page.line((_MARGIN, y), (width - _MARGIN, y), _RULE)
        page.text((_MARGIN, y + 10), _clipped(f"{row.task}: {row.metric}", 14), INK, 14)
        page.text((_MARGIN, y + 28), _clipped(row.about["encoder"], 11), FAINT, 11)
        rest = ", ".join(row.about[name] for name in ("budget", "data") if name in row.about)
        page.text((_MARGIN, y + 43), _clipped(rest, 11), FAINT, 11)
        _draw_cells(page, row, columns, y)
    return page.image.reduce(_FINE)


def _columns(table: Table) -> list[tuple[str, int]]:
    """(kind, number of the encoder of that kind within a row): rows of other encoders share columns."""
    most = {kind: max(sum(each == kind for each, _ in row.cells) for row in table.rows) for kind in KINDS}
    return [(kind, i) for kind in KINDS for i in range(most[kind])]


def _draw_cells(page: _Page, row: Row, columns: list[tuple[str, int]], y: int) -> None:
    by_kind = {kind: [column for column in row.cells if column[0] == kind] for kind in KINDS}
    means = [cell[row.metric].mean for cell in row.cells.values() if row.metric in cell]
    full = max(1.0, *means)
    for i, (kind, place) in enumerate(columns):
        x = _MARGIN + _LABEL + i * _CELL
        if place >= len(by_kind[kind]):
            continue
        column = by_kind[kind][place]
        number = row.cells[column].get(row.metric)
        if number is None:
            continue
        page.text((x, y + 8), number_text(number), INK, 14)
        length = (_CELL - 30) / full
        page.box((x, y + 29), (x + _CELL - 30, y + 37), _FADED)
        page.box((x, y + 29), (x + max(1, number.mean * length), y + 37), _COLOURS[kind])
        if number.spread:
            low, high = (min(full, max(0.0, number.mean + side * number.spread)) for side in (-1, 1))
            page.line((x + low * length, y + 33), (x + high * length, y + 33), INK)
        page.text((x, y + 43), _clipped(column[1], 11, _CELL - 14), FAINT, 11)


class _Page:
    """A white page; positions are in final pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _FINE, height * _FINE), PAPER)
        self.canvas = ImageDraw.Draw(self.image)

    def text(self, at: tuple[float, float], text: str, colour: str, size: int) -> None:
        self.canvas.text((at[0] * _FINE, at[1] * _FINE), text, colour, font(size * _FINE))

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        self.canvas.line([(x * _FINE, y * _FINE) for x, y in (start, end)], colour, round(1.5 * _FINE))

    def box(self, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        self.canvas.rectangle([(x * _FINE, y * _FINE) for x, y in (start, end)], colour)


def _clipped(text: str, size: int, width: int = _LABEL - 14) -> str:
    """As much of a text as fits."""
    while font(size).getlength(text) > width:
        text = text[:-2] + "\u2026"
    return text
