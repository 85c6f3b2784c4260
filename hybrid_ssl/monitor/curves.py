"""A picture of a run: its losses, k-NN accuracy and feature statistics over steps, drawn from `metrics.jsonl`.

One small panel for each loss, since objectives differ in scale; one for k-NN with the accuracy of raw pixels as a
dashed line; one for the feature std. Drawn with Pillow alone, at three times the size and then reduced, which smooths
lines and text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from PIL import Image, ImageDraw

from .log import read_metrics
from .pictures import FAINT, INK, PAPER, font

_GRID = "#e6e9ec"
_COLOURS = ("#0b6fb8", "#d1661a", "#138a63", "#a8518a")  # after Okabe and Ito: told apart by everybody
_FINE = 3  # drawn this much larger
_WIDTH, _HEIGHT, _COLUMNS = 380, 260, 3  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 62, 40
_MANY = 60  # points from which a smoothed line is drawn over the raw one
_MOST = 500  # points of a line; a longer one is drawn by the medians of equal shares
_PROBES = {
    "knn": "k-NN accuracy",
    "std": "feature std (1 = isotropic)",
    "rank_centred": "rank of the features",
    "start_cosine": "cosine to the start's features",
}

Points = Sequence[tuple[float, float]]


@dataclass
class Panel:
    """One chart: lines by name, dashed levels by name."""

    title: str
    lines: Mapping[str, Points]
    levels: Mapping[str, float] = field(default_factory=dict)
    percent: bool = False


def curves(path: str | Path) -> Image.Image:
    """Draw a run's `metrics.jsonl`; a run that recorded nothing to draw is a `ValueError`."""
    rows = read_metrics(path)
    panels = panels_of(rows)
    if not panels:
        raise ValueError(f"{path} has no losses or probe results yet: {len(rows)} lines")
    columns = min(_COLUMNS, len(panels))
    size = (columns * _WIDTH, -(-len(panels) // columns) * _HEIGHT)
    page = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), PAPER)
    last = max(row["step"] for row in rows)
    for i, panel in enumerate(panels):
        corner = (i % columns * _WIDTH, i // columns * _HEIGHT)
        _Chart(ImageDraw.Draw(page), corner, panel, last).draw()
    return page.reduce(_FINE)


def panels_of(rows: Iterable[Mapping[str, Any]]) -> list[Panel]:
    """What there is to draw: names ending in `loss` or one of `_PROBES`; `raw_pixels/knn` is dashed."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                series.setdefault(name, []).append((row["step"], value))
    losses = sorted((name for name in series if _last_part(name) == "loss"), key=lambda name: name != "loss")
    if len(losses) == 2 and "loss" in losses:
        losses.remove("loss")  # a single objective: its loss is the sum
    panels = [Panel(_loss_title(name), {"latest": series[name]}) for name in losses]
    for ending, title in _PROBES.items():
        names = sorted(name for name in series if _last_part(name) == ending)
        lines = {_net(name): series[name] for name in names if "raw_pixels" not in name}
        levels = {_net(name).replace("_", " "): series[name][-1][1] for name in names if "raw_pixels" in name}
        if lines:
            panels.append(Panel(title, lines, levels, percent=ending == "knn"))
    return panels


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high]: steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = min((power * f for f in (1, 2, 2.5, 5, 10)), key=lambda s: abs(span / s - about))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def thin(points: Points, most: int = _MOST) -> Points:
    """At most `most` points: medians of neighbours."""
    size = -(-len(points) // most)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(median(x for x, _ in group), median(y for _, y in group)) for group in groups]


def smooth(points: Points, share: float = 0.03) -> Points:
    """Median, then mean of the neighbours on both sides: no lag, and a single spike leaves no trace."""
    reach = max(1, round(share * len(points)))
    values = [y for _, y in points]
    for middle in (median, fmean):
        values = [middle(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _net(name: str) -> str:
    """`probe/teacher/knn` -> `teacher`."""
    return name.split("/")[-2] if "/" in name else name


def _loss_title(name: str) -> str:
    return "loss (weighted sum)" if name == "loss" else f"{name.rpartition('/')[0]} loss"


class _Chart:
    """Draws one panel; positions are in final pixels, `_FINE` times finer on the canvas."""

    def __init__(self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], panel: Panel, last_step: int) -> None:
        self.canvas, self.panel = draw, panel
        self.left, self.right = corner[0] + _LEFT, corner[0] + _WIDTH - _RIGHT
        self.top, self.bottom = corner[1] + _TOP, corner[1] + _HEIGHT - _BOTTOM
        values = sorted(y for line in panel.lines.values() for _, y in line)
        spikes = len(values) // 100  # the highest 1 % may leave the frame, or one spike flattens the rest
        shown = [*values[: len(values) - spikes], *panel.levels.values()]
        self.y_ticks = ticks(min(shown), max(shown), 4)
        self.x_ticks = [t for t in ticks(0, last_step, 4) if t <= last_step and t == round(t)]
        self.low, self.high, self.last = self.y_ticks[0], self.y_ticks[-1], last_step

    def draw(self) -> None:
        self._text((self.left, self.top - 36), self.panel.title, INK, 14, "ls")
        self._axes()
        for colour, whole in zip(_COLOURS, self.panel.lines.values(), strict=False):
            line = thin(whole)
            many = len(line) > _MANY
            if many:
                self._line(line, _lighter(colour), 1.0)
            self._line(smooth(line) if many else line, colour, 2.0)
            if len(line) <= 30:
                for point in line:
                    self._dot(point, colour)
        for level in self.panel.levels.values():
            self._dashed(level)
        self._legend()

    def _axes(self) -> None:
        for value in self.y_ticks:
            y = self._at((0, value))[1]
            self._stroke([(self.left, y), (self.right, y)], _GRID, 1)
            label = f"{value:.0%}" if self.panel.percent and self._step() >= 0.01 else _number(value)
            self._text((self.left - 8, y), label, FAINT, 11, "rm")
        for step in self.x_ticks:
            self._text((self._at((step, 0))[0], self.bottom + 8), _number(step), FAINT, 11, "mt")
        self._text((self.right, self.bottom + 32), "step", FAINT, 11, "rs")
        self._stroke([(self.left, self.bottom), (self.right, self.bottom)], FAINT, 1)

    def _legend(self) -> None:
        x = float(self.left)
        names = [(name, colour, False) for name, colour in zip(self.panel.lines, _COLOURS, strict=False)]
        for name, colour, dashed in names + [(name, INK, True) for name in self.panel.levels]:
            y = self.top - 18
            for part in ((0, 6), (10, 16)) if dashed else ((0, 16),):
                self._stroke([(x + part[0], y), (x + part[1], y)], colour, 1.5 if dashed else 2.5)
            value = f" {self.panel.levels[name]:.1%}" if dashed else f" {self._last_value(name)}"
            self._text((x + 21, y), name + value, INK, 11, "lm")
            x += 21 + font(11).getlength(name + value) + 16

    def _last_value(self, name: str) -> str:
        value = self.panel.lines[name][-1][1]
        return f"{value:.1%}" if self.panel.percent else f"{value:.3g}"

    def _step(self) -> float:
        return self.y_ticks[1] - self.y_ticks[0]

    def _at(self, point: tuple[float, float]) -> tuple[float, float]:
        x = self.left + (self.right - self.left) * point[0] / max(1, self.last)
        y = self.bottom - (self.bottom - self.top) * (point[1] - self.low) / (self.high - self.low)
        return x, min(self.bottom, max(self.top, y))

    def _line(self, points: Points, colour: str, width: float) -> None:
        self._stroke([self._at(point) for point in points], colour, width)

    def _dashed(self, level: float) -> None:
        y = self._at((0, level))[1]
        for x in range(self.left, self.right, 10):
            self._stroke([(x, y), (min(x + 6, self.right), y)], INK, 1.5)

    def _dot(self, point: tuple[float, float], colour: str) -> None:
        x, y = (v * _FINE for v in self._at(point))
        r = 2.5 * _FINE
        self.canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def _stroke(self, points: Points, colour: str, width: float) -> None:
        self.canvas.line([(x * _FINE, y * _FINE) for x, y in points], colour, round(width * _FINE), joint="curve")

    def _text(self, at: tuple[float, float], text: str, colour: str, size: int, anchor: str) -> None:
        self.canvas.text((at[0] * _FINE, at[1] * _FINE), text, colour, font(size * _FINE), anchor=anchor)


def _number(value: float) -> str:
    """A tick label: `1.5`, `20k`, `3M`."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e3 and value % 100 == 0 else f"{value:g}"


def _lighter(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) * 0.35):02x}" for part in parts)
