"""The one-way street: which room may import which. One that runs uphill fails here, also inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hybrid_ssl

ROOT = Path(hybrid_ssl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

BASE = {"settings", "schedule", "plan"}  # words that every room speaks
MODEL = BASE | {"nn", "encoder", "objectives"}
RUN = {"gallery", "assemble", "contract", "engine", "journal", "outcome"}  # the parts of train
MAY_IMPORT: dict[str, set[str]] = {
    "settings": set(),
    "schedule": {"settings"},
    "plan": {"settings", "schedule"},
    "reading": set(),
    "storage": set(),
    "exported": set(),
    "nn": set(),
    "encoder": {"settings", "plan", "nn", "exported"},
    "tokenizer": BASE | {"nn", "storage", "data", "monitor"},
    "objectives": BASE | {"nn", "tokenizer"},  # its networks and files: BEiT reads a frozen one
    "optim": BASE | {"objectives"},
    "frozen": BASE | {"encoder"},
    "pretrainer": MODEL | {"frozen"},
    "data": BASE | {"storage"},
    "checkpoint": BASE | {"storage"},
    "monitor": BASE | {"storage", "data", "encoder"},
    "config": MODEL | {"reading", "optim", "data", "monitor", "frozen"},
    "assemble": MODEL | {"optim", "pretrainer", "data", "config", "frozen"},
    "contract": {"config", "reading", "checkpoint"},
    "journal": {"schedule", "config", "engine", "monitor"},
    "engine": {"config", "plan", "nn"},
    "hub": MODEL | {"exported", "storage", "checkpoint", "config", "data", "monitor"},
    "outcome": MODEL | {"pretrainer", "data", "monitor", "config", "engine", "hub"},
    "gallery": MODEL | {"pretrainer", "data", "monitor", "config"},
    "train": MODEL | RUN | {"optim", "pretrainer", "data", "storage", "checkpoint", "monitor", "config", "hub"},
    "downstream": MODEL
    | {"reading", "optim", "data", "storage", "checkpoint", "monitor", "config"}
    | {"engine", "contract", "assemble", "hub"},
    "anomaly": {"encoder", "data", "monitor", "hub"},
    "cli": {"config", "storage", "train", "hub", "downstream", "anomaly", "tokenizer"},
}
OWNERS = {  # a library whose insides only these rooms may know
    "timm": {"encoder", "hub", "downstream", "engine"},  # engine: its version
    "accelerate": {"engine", "journal", "outcome", "train", "monitor", "downstream"},  # monitor: its trackers
    "datasets": {"data"},
    "transformers": {"hub"},
    "yaml": {"reading"},
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a file imports."""
    package = ("hybrid_ssl", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of another room."""
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "hybrid_ssl" and len(parts) > 1 and parts[1] in MAY_IMPORT and parts[1] != room_of(path):
            yield line, parts[1]


def test_the_street_has_one_direction() -> None:
    order = list(TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError
    assert order[-1] == "cli"


def test_every_file_stands_in_a_known_room() -> None:
    strangers = {room_of(path) for path in FILES} - MAY_IMPORT.keys() - {"__init__"}
    assert not strangers, f"say in MAY_IMPORT what these rooms may import: {strangers}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_runs_uphill(path: Path) -> None:
    allowed = MAY_IMPORT.get(room_of(path), set())
    uphill = [f"line {line}: {room}" for line, room in rooms_imported(path) if room not in allowed]
    assert not uphill, f"{path.name} ({room_of(path)}) may import {sorted(allowed)}, but imports {uphill}"


@pytest.mark.parametrize("library", OWNERS)
def test_library_is_known_to_its_rooms_only(library: str) -> None:
    users = {room_of(path) for path in FILES for _, name in imports(path) if name.split(".")[0] == library}
    assert users <= OWNERS[library]


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "files.py"
    file.write_text("from ..encoder import x\nfrom .. import config\nfrom .masks import y\nimport hybrid_ssl.train\n")
    assert [room for _, room in rooms_imported(file)] == ["encoder", "config", "train"]


def test_nothing_is_called_utils() -> None:
    assert not [path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc"}]
