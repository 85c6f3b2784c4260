"""Folders that are complete or absent, and folders that belong to one run at a time.

A folder is written under a temporary name beside its final one, every file and the folder itself are fsynced, and one
rename makes it visible. A killed process, a full disk or a power cut therefore leaves either the old state or the new
one, plus leftovers whose names start with a dot and that `sweep` clears at the next start:

    .tmp-NAME-*  never finished: removed
    .del-NAME-*  was being deleted: removed
    .old-NAME-*  was being replaced: put back if its successor never arrived, else removed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_LEFTOVER = re.compile(r"\.(tmp|del|old)-(.+)-[0-9a-f]{32}")
_locked: set[Path] = set()  # POSIX locks do not exclude a second holder in the same process


class StorageError(OSError):
    """The disk, not the recipe: no space, no permission, a file that cannot be read back."""


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it becomes `target` when the block ends without an exception.

    An earlier `target` is replaced, but stays until the new one is complete. After an exception nothing is left.

    Raises:
        StorageError: the folder cannot be written; the system's reason is in the text.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{uuid4().hex}"
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(temporary.stat().st_mode & 0o666)  # safetensors makes files that only their owner reads
            sync(path)
        _swap(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
        raise


def _swap(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an existing target steps aside first and is deleted last."""
    aside = target.parent / f".old-{target.name}-{uuid4().hex}"
    replaced = target.exists()
    if replaced:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if replaced:
            os.rename(aside, target)
        raise
    sync(target.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)  # what remains is swept


def remove(folder: Path) -> None:
    """Delete a folder so that it is never seen half deleted."""
    doomed = folder.parent / f".del-{folder.name}-{uuid4().hex}"
    os.rename(folder, doomed)
    sync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> list[str]:
    """Clear what a killed process left in `folder`; returns the names. Call it only while holding the run's lock."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        found.append(path.name)
        kind, name = match.groups()
        if kind == "old" and not (folder / name).exists():
            os.rename(path, folder / name)
            sync(folder)
        else:
            shutil.rmtree(path)
    return found


def require_space(folder: Path, size: int) -> None:
    """Refuse to start writing `size` bytes unless 1.2 times as many are free.

    Raises:
        StorageError: how much is free, how much is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < 1.2 * size:  # a fifth more: file system overhead, and other writers on the same disk
        raise StorageError(
            f"{folder} has {free / 1e6:.0f} MB free, {1.2 * size / 1e6:.0f} MB are needed: "
            "free some space, or lower `run.keep`"
        )


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The system releases it when the process ends, however it ends.

    A record lock (`lockf`), because worker processes that outlive a killed run must not inherit it.

    Raises:
        ValueError: another live process holds it, and which; or it cannot be written, and why.
    """
    folder = folder.resolve()
    if folder in _locked:
        raise ValueError(f"{folder} is in use by this very process: choose another `run.out`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another `run.out`") from error
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 1000, 0).decode(errors="replace") or "an unknown process"
            raise ValueError(f"{folder} is in use by {owner}: stop that run, or choose another `run.out`") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _locked.add(folder)
        try:
            yield
        finally:
            _locked.discard(folder)
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)  # closing releases
