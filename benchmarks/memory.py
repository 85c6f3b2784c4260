"""Peak memory of a few steps, each contestant in a fresh process: `python -m benchmarks.memory ENTRY METHOD ...`.

Counted from what the process held once everything was imported, so that a library's imports do not weigh.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import cast

import torch

from .contestants import build
from .work import FULL, QUICK, Precision, Work

STEPS = 3  # the optimizer's state exists from the second on


def peak_megabytes(entry: str, work: Work) -> float:
    """Peak resident memory above that of the imports, in a process of its own."""
    name = "quick" if work.size == QUICK else "full"
    command = [sys.executable, "-m", "benchmarks.memory", entry, work.method, work.precision, name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def _measure(entry: str, method: str, precision: str, size: str) -> float:
    torch.set_num_threads(1)
    build(entry, Work(method, "fp32", QUICK))  # imports everything; itself a few megabytes
    before = _peak()
    trainer = build(entry, Work(method, cast(Precision, precision), QUICK if size == "quick" else FULL))
    for _ in range(STEPS):
        trainer.forward_backward()
        trainer.update()
    return max(1.0, _peak() - before)  # tiny sizes fit into what the imports left free


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would start from the size of the process that started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10  # kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
