"""The results as Markdown, and their place in docs/performance.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .datapath import DataResult
from .timing import StepResult
from .work import Size, Work

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- made by python -m benchmarks: begin -->", "<!-- made by python -m benchmarks: end -->"


@dataclass(frozen=True)
class MemoryResult:
    """Peak megabytes, ours and a peer's."""

    work: Work
    peer: str
    ours: float
    theirs: float


def machine() -> str:
    """The hardware in general words, and the versions."""
    flags = _cpu_flags()
    kinds = [name for name, flag in (("AMX", "amx_bf16"), ("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags]
    names = ("torch", "torchvision", "timm", "lightly", "transformers", "pillow")
    versions = ", ".join(f"{name} {found}" for name in names if (found := _version(name)))
    cores = f"{os.cpu_count()} {platform.machine()} CPU cores" + (f" with {kinds[0]}" if kinds else "")
    return f"{cores}, one thread used; {versions}; Python {platform.python_version()}."


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def describe(size: Size) -> str:
    return (
        f"ViT of {size.depth} blocks x {size.dim}, {size.side} pixels in patches of {size.patch}. MAE and SimMIM: "
        f"{size.batch} images, decoder {size.decoder_depth} x {size.decoder_dim}. MoCo v3, DINO, iBOT: "
        f"{max(2, size.batch // 2)} images; heads {size.moco_hidden} / {size.moco_dim}; 2 crops and {size.locals} of "
        f"{size.local_side} pixels, {size.dino_prototypes} and {size.ibot_prototypes} prototypes. AdamW for all: fused "
        "in ours, torch's default in the peers."
    )


def steps_table(results: Sequence[StepResult]) -> list[str]:
    lines = [
        "| method | precision | peer | its step / ours | its forward + backward / ours | our step, s |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        cells = (r.work.method, r.work.precision, r.peer, r.step, r.compute, f"{r.ours_seconds:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def memory_table(results: Sequence[MemoryResult]) -> list[str]:
    lines = ["| method | precision | peer | its peak / ours | our peak, MB |", "|---|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r.work.method} | {r.work.precision} | {r.peer} | {r.theirs / r.ours:.2f} | {r.ours:.0f} |")
    return lines


def data_table(results: Sequence[DataResult]) -> list[str]:
    lines = ["| views | pipeline | images / s / core | its time / ours |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r.task} | {r.pipeline} | {r.images:.0f} | {r.ratio} |")
    return lines


def write(text: str, page: Path = PAGE) -> None:
    """Put `text` between the markers of the page.

    Raises:
        ValueError: the page has no markers.
    """
    old = page.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"{page.name} lacks the lines {BEGIN!r} and {END!r} between which the tables stand: add them")
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
