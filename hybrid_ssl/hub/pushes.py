"""Pushing while a run goes on: in a process of its own, from a snapshot, so that the run neither waits nor fails.

A push that fails, hangs or is refused costs the run one line of its log; the encoder stays in the run's folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .verify import launcher_free

WAIT = 1800  # seconds at the end of a run: 10 GB at 50 Mbit/s
SNAPSHOT = ".pushing"


class PushesOfRun:
    """All pushes of one run, one at a time.

    Args:
        out: the run's folder, on whose disk the snapshot of the export is made.
        repo: `user/name`.
        private: of a repository that is made.
        say: takes one line.
    """

    def __init__(self, out: Path, repo: str, *, private: bool, say: Callable[[str], None]) -> None:
        self.out, self.repo, self.private, self.say = out, repo, private, say
        self._process: subprocess.Popen[str] | None = None
        self._output: IO[str] | None = None
        self._what = ""

    def start(self, export: Path, what: str) -> bool:
        """Begin to push `export` as it is now; False if that was left out, e.g. while an earlier push goes on.

        Args:
            what: e.g. "step 500"; for the log and the commit's message.
        """
        if self.running():
            self.say(f"{what} is not pushed to {self.repo}: the push of {self._what} still goes on")
            return False
        self._what = what
        try:
            _snapshot(export, self.out / SNAPSHOT)
            self._output = tempfile.TemporaryFile("w+")
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "hybrid_ssl.hub.push", str(self.out / SNAPSHOT), self.repo,
                    "private" if self.private else "public", f"Upload encoder of {what}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                text=True,
                env=launcher_free() | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C is for the run, which then stops this one, too
            )  # fmt: skip
        except OSError as error:
            self._failed(str(error))
            return False
        return True

    def running(self) -> bool:
        """Whether a push still goes on; says how the last one ended if that is new."""
        if self._process is None:
            return False
        if self._process.poll() is None:
            return True
        self._report(self._process.returncode)
        return False

    def finish(self, timeout: float = WAIT) -> None:
        """Wait for the push that goes on, but not for ever."""
        if self._process is None:
            return
        try:
            self._report(self._process.wait(timeout))
        except subprocess.TimeoutExpired:
            self.stop()
            self._failed(f"not finished after {timeout:.0f} s")

    def stop(self) -> None:
        """End the push that goes on; the Hub keeps what it had."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._clean()

    def _report(self, code: int) -> None:
        assert self._output is not None
        self._output.seek(0)
        lines = self._output.read().strip().splitlines() or [f"exit code {code}"]
        self._clean()
        if code:
            self._failed(lines[-1])
        else:
            self.say(f"{self._what} pushed to {self.repo}: {lines[-1]}")

    def _failed(self, why: str) -> None:
        self.say(
            f"warning: {self._what} was not pushed, the run goes on: {why}\n"
            f"  by hand: hybrid-ssl push {self.out} {self.repo}{' --private' if self.private else ''}"
        )

    def _clean(self) -> None:
        self._process = None
        if self._output is not None:
            self._output.close()
            self._output = None
        shutil.rmtree(self.out / SNAPSHOT, ignore_errors=True)


def _snapshot(export: Path, target: Path) -> None:
    """The files of `export` under another name: it may be replaced before they are all sent."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for file in export.iterdir():
        try:
            os.link(file, target / file.name)  # costs no space; exports are replaced, never written into
        except OSError:
            shutil.copyfile(file, target / file.name)
