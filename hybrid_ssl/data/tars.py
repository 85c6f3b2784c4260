"""Tar shards in the webdataset layout: members that share a name up to the first dot are one sample.

`0001.jpg` + `0001.cls` (or `0001.json` with a "label") make a labelled image. Shards are indexed once by reading
their headers; images are then read in any order at their offsets, so that tar files give the same exact order and
resume as folders do. Nothing is ever extracted or unpickled: member names are never used as paths, only regular
members count, and a compressed tar, which has no offsets, is refused.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .files import EXTENSIONS
from .sources import Images, NoSplit, as_labels, printable

_LABELS = (".cls", ".json")
_JSON_KEYS = ("label", "cls", "class", "y")
_LONGEST_LABEL = 1 << 20  # bytes; a label file is text of a few


class Member(NamedTuple):
    """One sample of a shard: where its image is, and its label."""

    name: str
    offset: int
    size: int
    label: int | str | None


class Tars(Images):
    """Images inside tar files, by number."""

    def __init__(self, shards: Sequence[Path], sentence: str) -> None:
        self.shards = [str(shard) for shard in shards]
        members = [(number, member) for number, shard in enumerate(self.shards) for member in index(shard)]
        if not members:
            raise ValueError(f"no images in {sentence}: members are named like 0001.jpg, with 0001.cls for a label")
        self._names = [member.name for _, member in members]
        self._places = torch.tensor([(number, member.offset, member.size) for number, member in members])  # [n, 3]
        labels = [member.label for _, member in members]
        if all(label is not None for label in labels):
            self.labels, self.class_names = as_labels(labels)
        self._sentence = sentence
        content = repr((self._names, self._places.tolist()))
        self.fingerprint = hashlib.blake2b(content.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> tuple[bytes, int | None]:
        shard, offset, size = self._places[i].tolist()
        return pread(self.shards[shard], offset, size), self.label(i)

    def name(self, i: int) -> str:
        return f"{printable(self._names[i])} in {printable(self.shards[int(self._places[i, 0])])}"

    def describe(self) -> str:
        return f"{len(self):,} images in {self._sentence}{', with labels' if self.labels is not None else ''}"


def pread(shard: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on; ValueError if they are not there."""
    try:
        with open(shard, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as problem:
        raise ValueError(f"cannot be read: {problem.strerror}") from problem
    if len(data) < size:
        raise ValueError(f"ends {size - len(data)} bytes early: the shard is cut off")
    return data


def find_shards(names: Sequence[str]) -> list[Path]:
    """Tar files, folders of them, or patterns such as `shards/train-*.tar`; empty if the names are none of these."""
    shards: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        elif path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise ValueError(f"{printable(name)} is a compressed tar, which has no random access: unpack it to .tar")
        else:
            found = sorted(Path(p) for p in glob.glob(str(path))) if path.suffix == ".tar" else []
        if not found:
            return []
        shards += found
    return shards


def open_tars(shards: Sequence[Path], split: str) -> Tars:
    """Index the shards; the only split is `train`."""
    several = f"{len(shards)} tar files in {printable(str(shards[0].parent))}"
    where = several if len(shards) > 1 else printable(str(shards[0]))
    if split != "train":
        raise NoSplit(where, split, ())
    return Tars(shards, where)


def index(shard: str) -> Iterator[Member]:
    """The samples of a shard in their order; only headers and labels are read."""
    sample: dict[str, tarfile.TarInfo] = {}
    stem: str | None = None
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if not info.isreg():
                    continue
                folder, _, base = info.name.rpartition("/")
                name, _, suffix = base.partition(".")
                if not name or f"{folder}/{name}" != stem:
                    yield from _member(tar, sample)
                    sample, stem = {}, f"{folder}/{name}"
                sample["." + suffix.lower()] = info
            yield from _member(tar, sample)
    except (tarfile.TarError, OSError, EOFError) as problem:
        raise ValueError(f"{printable(shard)} is no tar file that can be read: {problem}") from problem


def _member(tar: tarfile.TarFile, sample: dict[str, tarfile.TarInfo]) -> Iterator[Member]:
    for suffix, info in sample.items():
        if suffix.endswith(EXTENSIONS):
            yield Member(info.name, info.offset_data, info.size, _label(tar, sample))
            return


def _label(tar: tarfile.TarFile, sample: dict[str, tarfile.TarInfo]) -> int | str | None:
    info = next((sample[suffix] for suffix in _LABELS if suffix in sample), None)
    if info is None or info.size > _LONGEST_LABEL:
        return None
    file = tar.extractfile(info)
    assert file is not None  # a regular member has content
    text = file.read().decode("utf-8", "replace").strip()
    if ".cls" not in sample:
        text = _from_json(text, info.name)
    if text is None or isinstance(text, int):
        return text
    return int(text) if text.lstrip("-").isdigit() else text


def _from_json(text: str, name: str) -> Any:
    try:
        values = json.loads(text)
    except ValueError:
        raise ValueError(f"{printable(name)} is no valid JSON") from None
    value = next((values[key] for key in _JSON_KEYS if key in values), None) if isinstance(values, dict) else values
    return value if isinstance(value, (int, str)) else None
