"""Checkpoints: everything a run needs to continue at the very step, in files that cannot run code.

A checkpoint is a folder `step-XXXXXXXX`:

    model.safetensors      tensors, one file per first part of their names ("model.encoder.norm.weight" -> model)
    optimizer.safetensors
    state.json             everything that is no tensor
    manifest.json          format, step, and size and sha256 of every other file

It appears by one rename (`storage.publish`), and counts only if every file has the size and the digest of the manifest:
the newest that verifies is the latest. There is no pointer file that could be wrong, and never a pickle.
Nested states (`optimizer.state_dict()`, a gradient scaler's, ...) become flat tensors plus JSON by `flatten`, and come
back bit for bit by `unflatten`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .storage import StorageError, publish, remove, require_space

FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[A-Za-z0-9_]+\.(safetensors|json)")
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted; the text says what is wrong with which file."""


class NonFiniteError(CheckpointError):
    """The state to be saved holds NaN or infinity; the previous checkpoint stays the latest."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-XXXXXXXX` and delete all but the newest `keep` checkpoints.

    Args:
        tensors: "part.rest.of.name" -> tensor on any device; each part becomes a file.
        state: everything that is no tensor; must be JSON.
        keep: at least 2, so that a newest one that breaks later loses one interval only.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; nothing was written.
        StorageError: no space, or the disk refused; nothing was written under a final name.
    """
    if keep < 2:
        raise ValueError(f"keep is {keep}: at least two checkpoints are kept, so that a broken newest one loses little")
    broken = nonfinite(tensors)
    if broken:
        raise NonFiniteError(f"step {step} is not saved, {len(broken)} tensors are not finite: {', '.join(broken[:5])}")
    text = _json(state, step)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, sum(t.numel() * t.element_size() for t in tensors.values()) + len(text))
    target = folder / f"step-{step:08d}"
    with publish(target) as path:
        for part, content in _parts(tensors).items():
            try:
                save_file(content, path / f"{part}.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:
                raise StorageError(f"cannot write {target / part}.safetensors: {error}") from error
        (path / "state.json").write_text(text)
        files = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in sorted(path.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for old in checkpoints(folder)[keep:]:
        try:
            remove(old)
        except OSError as error:  # the new one is safe; an old one too many is no reason to stop
            _log.warning("%s could not be deleted: %s", old, error)
    return target


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back, after checking every digest: (tensors on the CPU by full name, state).

    Raises:
        CheckpointError: the folder is no complete, unchanged checkpoint.
    """
    problem = fault(path)
    if problem:
        raise CheckpointError(f"{path} cannot be loaded: {problem}")
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update({f"{file.stem}.{name}": t for name, t in load_file(file).items()})
    return tensors, json.loads((path / "state.json").read_text())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None if there is none at all.

    Raises:
        CheckpointError: there are checkpoints, but none verifies. Starting afresh would hide that.
    """
    found = checkpoints(folder)
    for path in found:
        problem = fault(path)
        if problem is None:
            return path
        _log.warning("%s is skipped: %s", path, problem)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is intact: remove them to restart")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """All finished checkpoints in `folder`, newest first, not verified."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _FOLDER.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found, reverse=True)]


def fault(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, in words; None if it is intact. Reads every byte."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        expected: dict[str, dict[str, Any]] = manifest["files"]
        present = {p.name for p in path.iterdir()} - {"manifest.json"}
        if not {"state.json"} <= expected.keys() or present != expected.keys():
            return f"files {sorted(present)}, the manifest lists {sorted(expected)}"
        for name, entry in expected.items():
            if not _FILE.fullmatch(name):
                return f"the manifest lists {name!r}, which is no file of a checkpoint"
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
            if _digest(path / name) != entry["sha256"]:
                return f"{name} was changed: its sha256 differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    return None


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    # a finite sum has finite terms: ten times faster than isfinite, which is asked only about the others
    return [
        name
        for name, t in floating.items()
        if not math.isfinite(t.sum(dtype=torch.float32).item()) and not bool(torch.isfinite(t).all())
    ]


def flatten(tree: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into flat tensors, named `prefix.path.to.tensor`, and the JSON that puts them back.

    Takes dicts (of any string or integer keys), lists, tuples, tensors, strings, numbers, bools and None. In the JSON,
    {"tensor": name} stands for a tensor, {"tuple": [...]} for a tuple, {"dict": [[key, value], ...]} for a dict.

    Raises:
        TypeError: the state holds something else; where.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            assert path not in tensors, f"two tensors are called {path}"
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, Mapping):
            assert all(type(key) in (str, int) for key in node), f"{path}: a key is neither str nor int"
            return {"dict": [[key, visit(value, f"{path}.{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            items = [visit(value, f"{path}.{i}") for i, value in enumerate(node)]
            return items if isinstance(node, list) else {"tuple": items}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"{path} is a {type(node).__name__}, which no checkpoint holds: use tensors, numbers or text")

    return tensors, visit(tree, prefix)


def unflatten(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The inverse of `flatten`; `tensors` may hold others as well."""
    if isinstance(tree, list):
        return [unflatten(tensors, item) for item in tree]
    if isinstance(tree, Mapping):
        ((kind, content),) = tree.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "tuple":
            return tuple(unflatten(tensors, item) for item in content)
        return {key: unflatten(tensors, value) for key, value in content}
    return tree


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two sharing memory: what safetensors accepts."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.numel() * value.element_size() or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(storage.data_ptr())
        result[name] = value
    return result


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the first part of their names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in separate(tensors).items():
        part, _, rest = name.partition(".")
        assert rest and re.fullmatch(r"\w+", part), f"{name!r}: a checkpoint's tensors are called 'part.name'"
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _json(state: dict[str, Any], step: int) -> str:
    """`state` as JSON text; NaN and infinity are refused, they are no JSON."""
    try:
        return json.dumps(state, indent=1, allow_nan=False)
    except ValueError as error:
        raise NonFiniteError(f"step {step} is not saved, its state holds a non-finite number: {error}") from None


def _digest(path: Path) -> str:
    """sha256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
