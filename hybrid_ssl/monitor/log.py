"""What a run says while it trains: `metrics.jsonl`, `train.log`, a progress bar or plain lines, and trackers.

`metrics.jsonl` has one JSON object a line and one line a step, e.g. {"step": 20, "loss": 3.1, "lr": 0.0001}; `step`
counts optimizer steps done (0: before training). On resume the file is cut back to the steps that the checkpoint
knows, so no step appears twice. A non-finite number is written as null, since NaN is no JSON.

On a terminal there is one bar; anywhere else one plain line per log interval, because a bar fills a log file.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .meter import Pace
from .redact import redact
from .trackers import open_trackers

METRICS = "metrics.jsonl"
LINES = "train.log"


class RunLog:
    """The voice of one run; on processes other than the main one it says and writes nothing.

    Args:
        folder: the run folder; made if missing.
        total_steps: length of the run.
        start: steps done before (resume); later lines of an older `metrics.jsonl` are removed.
        main: whether this is the main process.
        trackers: names of `trackers.PACKAGES`.
        config: the resolved recipe as plain data, for the trackers.
        terminal: show a bar; None: if stdout is a terminal.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        start: int = 0,
        *,
        main: bool = True,
        trackers: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
        terminal: bool | None = None,
    ) -> None:
        self.folder, self.total_steps, self.main = Path(folder), total_steps, main
        self._bar: Any = None
        self._trackers: list[Any] = []
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._trackers = open_trackers(trackers, self.folder, config or {}, start)
        self._last = cut(self.folder / METRICS, start)
        self._metrics = open(self.folder / METRICS, "ab")
        # where the last line begins; it is rewritten when its step gets more
        self._offset = self._metrics.tell() - (len(_line(self._last)) if self._last else 0)
        self._lines = open(self.folder / LINES, "a", encoding="utf-8")
        if sys.stdout.isatty() if terminal is None else terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done; costs nothing off a terminal."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def line(self, text: str) -> None:
        """Say something: to the terminal and to `train.log`."""
        if not self.main:
            return
        text = redact(text)
        self._lines.write(text + "\n")
        self._lines.flush()
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of a step to `metrics.jsonl` and the trackers; a second call for a step adds to its line."""
        if not self.main:
            return
        if self._last and step < self._last["step"]:
            raise ValueError(f"step {step} was recorded after step {self._last['step']}: steps only grow")
        if self._last and step == self._last["step"]:
            self._metrics.truncate(self._offset)
        else:
            self._offset, self._last = self._metrics.tell(), {"step": step}
        self._last |= {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.seek(self._offset)
        self._metrics.write(_line(self._last))
        self._metrics.flush()
        known = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(known, step=step)

    def train(self, step: int, values: Mapping[str, float], pace: Pace) -> None:
        """Record a log interval's numbers with its pace, and show them."""
        self.record(step, {**values, "images_per_second": pace.images_per_second, "data_wait": pace.data_wait})
        if not self.main:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        rate = f"{pace.images_per_second:,.{0 if pace.images_per_second >= 100 else 1}f} images/s"
        speed = f"{rate}  data wait {pace.data_wait:.0%}  {duration(pace.seconds_left)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{shown}  {speed}", refresh=False)
            self._lines.write(f"step {step}/{self.total_steps}  {shown}  {speed}\n")
            self._lines.flush()
        else:
            width = len(str(self.total_steps))
            self.line(f"step {step:>{width}}/{self.total_steps} {step / self.total_steps:4.0%}  {shown}  {speed}")

    def close(self) -> None:
        """Flush everything; the log is not used afterwards."""
        if not self.main:
            return
        for tracker in self._trackers:
            tracker.finish()
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()
        self._lines.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one that a killed process left half-written is skipped."""
    rows = []
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def cut(path: Path, step: int) -> dict[str, Any]:
    """Remove what is beyond `step` from a `metrics.jsonl` (0: everything); returns the last row that stays, or {}."""
    if not path.exists():
        return {}
    rows = [row for row in read_metrics(path) if row["step"] <= step and step > 0]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.writelines(_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return rows[-1] if rows else {}


def duration(seconds: float) -> str:
    """Seconds as people say them: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()
