"""Image files: folders, read recursively, and lists of files.

A folder is scanned once, before the first step. Only regular files count: a FIFO named x.jpg would block a worker for
ever. A directory is entered once, however many links lead to it (a link to a parent multiplied the data by 41 in four
toolkits); a linked file counts unless the file itself was found too. Names may be any bytes. If every image lies in a
sub-folder and there are at least two, these are the classes; if the sub-folders are called train, val, test, they are
the splits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .sources import Images, NoSplit, as_labels, printable

EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .npy".split())
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
_SIZED = 1000  # so many file sizes go into the fingerprint: a stat of each of 1e7 files takes minutes on a network disk


class Files(Images):
    """A fixed list of image files.

    Args:
        paths: where they are.
        keys: what identifies them, wherever the folder was moved to.
        labels: integers or class names, if there are any.

    The names are packed into one array: a list of 1e7 strings would be copied into every forked worker, page by
    page, by the reference counts that reading changes.
    """

    def __init__(self, paths: Sequence[str], keys: Sequence[str], labels: Sequence[Any] | None, sentence: str) -> None:
        names = [os.fsencode(path) for path in paths]
        self._names = np.frombuffer(b"".join(names), dtype=np.uint8)
        self._ends = np.cumsum([0, *(len(name) for name in names)])
        self._key_lengths = np.array([len(os.fsencode(key)) for key in keys], dtype=np.int32)
        if labels is not None:
            self.labels, self.class_names = as_labels(labels)
        self._sentence = sentence
        self.fingerprint = _fingerprint(paths, keys)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def path(self, i: int) -> str:
        return os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]].tobytes())

    def key(self, i: int) -> str:
        return os.fsdecode(os.fsencode(self.path(i))[-int(self._key_lengths[i]) :])  # a path ends with its key

    def read(self, i: int) -> tuple[str, int | None]:
        return self.path(i), self.label(i)

    def name(self, i: int) -> str:
        return printable(self.path(i))

    def describe(self) -> str:
        return self._sentence


def open_folders(folders: Sequence[Path], split: str) -> Files:
    """One folder or several, with everything below them."""
    paths: list[str] = []
    keys: list[str] = []
    classes: list[str] | None = []
    ignored = inside = 0
    shown = ", ".join(printable(str(folder)) for folder in folders)
    for folder in folders:
        _check_folder(folder)
        scan = _Scan(_pick_split(folder, split))
        if not scan.images:
            raise ValueError(
                f"no images in {printable(str(folder))} ({scan.ignored} other files): expected {' '.join(EXTENSIONS)}"
            )
        inner = [path[len(scan.root) :].lstrip(os.sep) for path in scan.images]
        keys += inner
        found = [path.split(os.sep, 1)[0] if os.sep in path else None for path in inner]
        classes = None if classes is None or None in found else classes + [name for name in found if name is not None]
        paths += scan.images
        ignored, inside = ignored + scan.ignored, inside + scan.folders
    if classes is not None and len(set(classes)) < 2:
        classes = None
    sentence = f"{len(paths):,} images in {shown} ({inside} folder{'s' * (inside != 1)}"
    sentence += f", {len(set(classes))} classes)" if classes else ")"
    if ignored:
        sentence += f", {ignored:,} other file{'s' * (ignored != 1)} ignored"
    return Files(paths, keys, classes, sentence)


def open_list(file: Path) -> Files:
    """A text file with one path a line, relative to the file's folder, optionally followed by a tab and a label."""
    lines = [line for line in os.fsdecode(file.read_bytes()).split("\n") if line.strip()]
    rows = [line.split("\t") for line in lines]
    if not rows:
        raise ValueError(f"{printable(str(file))} is empty: write one image path a line, optionally a tab and a label")
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(rows[0]) or len(row) > 2), None)
    if wrong is not None:
        raise ValueError(f"{printable(str(file))}: line {wrong + 1} is not 'path' or 'path<tab>label' like line 1")
    paths = [os.path.join(file.parent, row[0].strip()) for row in rows]
    missing = next((path for path in paths if not os.path.isfile(path)), None)
    if missing is not None:
        raise ValueError(f"{printable(str(file))} lists {printable(missing)}, which is no file")
    labels: list[Any] | None = [row[1].strip() for row in rows] if len(rows[0]) == 2 else None
    if labels and all(label.lstrip("-").isdigit() for label in labels):
        labels = [int(label) for label in labels]
    sentence = f"{len(paths):,} images listed in {printable(str(file))}{', with labels' if labels else ''}"
    return Files(paths, [row[0].strip() for row in rows], labels, sentence)


class _Scan:
    """What lies under one folder: sorted image paths, number of folders that hold some, number of other files."""

    def __init__(self, root: str) -> None:
        self.root, self.ignored = root, 0
        self._seen: set[tuple[int, int]] = set()
        walked = list(self._walk(root))
        found = [path for path, linked in walked if not linked]
        if len(found) < len(walked):
            real = {os.path.realpath(path) for path in found}
            targets = {os.path.realpath(path): path for path, linked in reversed(walked) if linked}
            found += [path for target, path in targets.items() if target not in real]
            self.ignored += len(walked) - len(found)
        self.images = sorted(found, key=os.fsencode)
        self.folders = len({os.path.dirname(path) for path in self.images})

    def _walk(self, folder: str) -> Iterator[tuple[str, bool]]:
        pending = [folder]
        while pending:
            here = pending.pop()
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in self._seen:
                continue
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
            for entry in ordered:
                if _is_dir(entry):
                    pending.append(entry.path)
                elif _is_image(entry):
                    yield entry.path, entry.is_symlink()
                else:
                    self.ignored += 1


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or not entry.name.lower().endswith(EXTENSIONS):
        return False
    try:
        return entry.is_file()  # a regular file, or a link to one
    except OSError:
        return False


def _check_folder(folder: Path) -> None:
    shown = printable(str(folder))
    if not folder.exists():
        raise ValueError(f"data.source: {shown} does not exist (looked in {printable(os.getcwd())})")
    if not folder.is_dir():
        raise ValueError(
            f"data.source: {shown} is a file that is no source: a folder, a .txt list, parquet, arrow or .tar files are"
        )


def _pick_split(folder: Path, split: str) -> str:
    """`folder` itself, or the sub-folder `split` if all its sub-folders are called like splits."""
    inside = sorted(entry.name for entry in os.scandir(folder) if _is_dir(entry))
    if inside and {name.lower() for name in inside} <= _SPLITS:
        if split not in inside:
            raise NoSplit(printable(str(folder)), split, inside)
        return os.path.join(folder, split)
    if split != "train":
        raise NoSplit(printable(str(folder)), split, ())
    return str(folder)


def _fingerprint(paths: Sequence[str], keys: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in keys:
        digest.update(os.fsencode(name) + b"\0")
    for path in paths[:: max(1, len(paths) // _SIZED)]:
        try:
            digest.update(f"{os.stat(path).st_size} ".encode())
        except OSError:  # gone since the scan; it will count as broken
            digest.update(b"? ")
    return digest.hexdigest()
