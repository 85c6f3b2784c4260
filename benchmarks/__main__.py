"""`python -m benchmarks [--quick] [--method mae ...] [--peer lightly ...] [--precision bf16 ...] [--part steps ...]`"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from . import report
from .contestants import OURS, PEERS, missing, peers_of
from .datapath import TASKS, compare_data
from .memory import peak_megabytes
from .timing import compare_steps
from .work import FULL, METHODS, PRECISIONS, QUICK, Work

PARTS = ("steps", "memory", "data")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions that count (default: 5)")
    args = parser.parse_args(argv)
    absent = missing(tuple(args.peer))
    if absent:
        parser.error(f"not installed: {', '.join(absent)}. Run `pip install .[bench]`, or choose with --peer")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # the peers' deprecations
    size = QUICK if args.quick else FULL
    lines = [report.machine(), "", report.describe(size)]
    for part, run in (("steps", _steps), ("memory", _memory), ("data", _data)):
        if part in args.part:
            lines += ["", *run(args)]
    lines += ["", f"Load of the machine at the end: {os.getloadavg()[0]:.1f}; {args.rounds} rounds."]
    text = "\n".join(lines)
    print(text)
    everything = parse([f"--rounds={args.rounds}"])
    if argv is None and args == everything:
        report.write(text)
        print(f"written to {report.PAGE}", file=sys.stderr)
    return 0


def _works(args: argparse.Namespace) -> list[Work]:
    size = QUICK if args.quick else FULL
    return [Work(method, precision, size) for precision in args.precision for method in args.method]


def _steps(args: argparse.Namespace) -> list[str]:
    results = []
    for work in _works(args):
        found = compare_steps(work, peers_of(work.method, tuple(args.peer)), args.rounds)
        _progress(*report.steps_table(found)[2:])
        results += found
    return report.steps_table(results)


def _memory(args: argparse.Namespace) -> list[str]:
    """One precision is enough, and for a quick look one method."""
    works = [work for work in _works(args) if work.precision == args.precision[0]][: 1 if args.quick else None]
    results = []
    for work in works:
        ours = peak_megabytes(OURS, work)
        for peer in peers_of(work.method, tuple(args.peer)):
            results.append(report.MemoryResult(work, peer, ours, peak_megabytes(peer, work)))
            _progress(report.memory_table(results)[-1])
    return report.memory_table(results)


def _data(args: argparse.Namespace) -> list[str]:
    images = 4 if args.quick else 24
    results = [r for task in TASKS for r in compare_data(task, args.rounds, images, args.peer)]
    lines = report.data_table(results)
    _progress(*lines[2:])
    return lines


def _progress(*rows: str) -> None:
    print(*rows, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
