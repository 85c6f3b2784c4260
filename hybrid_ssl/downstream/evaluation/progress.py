"""How far a long pass is: a bar on a terminal, a line now and then elsewhere, on the first process only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ...nn.distributed import rank

_EVERY = 30.0  # seconds between two lines: a log file of an hour has 120


class Bar:
    """A context: `move` says how much of `total` is done.

    Args:
        what: things that are counted.
        say: where lines go to off a terminal.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None]) -> None:
        self.what, self.total, self.say = what, total, say
        self._bar: Any = None
        self._said = time.monotonic()

    def __enter__(self) -> Bar:
        if rank() == 0 and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.what, dynamic_ncols=True, leave=False)
        return self

    def move(self, done: int) -> None:
        """So many are done."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said > _EVERY:
            self._said = time.monotonic()
            self.say(f"{self.what} {done:,} of {self.total:,}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
