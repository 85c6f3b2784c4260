"""One pass of a frozen encoder over training and test images, shared by all protocols and kept on disk.

Images go through in blocks of `run.batch_size`; process r of W takes blocks r, r + W, ..., each image exactly once,
and after every round the features are put together on all processes. A block is the same on any number of processes,
so the features are, too. On disk they are called after everything that decides them: the weights' digest, the data's
fingerprint, size, crop, pooling, precision. Images that cannot be read are named and left out.

Shapes: n images of a split, m of them readable, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...nn.distributed import gather_no_grad, gather_objects, rank, world_size
from ...storage import StorageError, publish
from ..batches import Broken, Counter
from ..classification.samples import LabelledImages
from .embed import Embedder, Part
from .images import Blocks, Wanted, shrunk
from .progress import Bar

SPLITS = ("train", "test")
_FILE, _FACTS = "features.safetensors", "facts.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """Readable images of a split with what is known of them."""

    features: dict[str, Tensor]
    """name -> [m, ...] on the CPU; see `embed.py`, and `pixels`"""
    labels: Tensor
    """int64 [m]"""
    rows: Tensor
    """int64 [m], their numbers among the split's images"""


@dataclass(frozen=True)
class Pass:
    """How the encoder goes over the images."""

    embedder: Embedder
    splits: Mapping[str, LabelledImages]
    """`train` and `test`"""
    shape: tuple[int, int, int]
    """[C, H, W] of an image"""
    batch_size: int
    workers: int
    max_broken: float
    facts: Mapping[str, Any]
    """all that decides the images: fingerprints, crop, channels, range"""
    say: Say

    def key(self, part: Part) -> str:
        """What a part of the features is called on disk; raw pixels do not depend on the encoder."""
        facts = {"part": part, "shape": self.shape, **self.facts}
        if part != "pixels":
            encoder = self.embedder
            facts |= {"weights": encoder.digest, "pooling": encoder.pooling, "precision": encoder.precision}
            facts |= {"mean_std": [encoder.normalise.mean.flatten().tolist(), encoder.normalise.std.flatten().tolist()]}
        text = json.dumps(facts, sort_keys=True).encode()
        return f"{part}-{hashlib.blake2b(text, digest_size=10).hexdigest()}"


def features(how: Pass, wanted: Collection[Part], cache: Path) -> dict[str, Split]:
    """What is wanted of both splits, from disk where an earlier pass left it; all processes call it.

    Raises:
        ValueError: too many images cannot be read, or none.
        FloatingPointError: the encoder gives features that are not finite.
    """
    found: dict[str, dict[str, Tensor]] = {split: {} for split in SPLITS}
    broken: dict[str, list[Broken]] = {}
    missing: list[Part] = []
    keys = {part: how.key(part) for part in sorted(wanted)}
    for part, key in keys.items():
        stored = _read(cache / key)
        if not all(gather_objects(stored is not None)):  # a disk that not all processes see
            missing.append(part)
            continue
        assert stored is not None
        broken = stored[1]
        for split in SPLITS:
            found[split] |= stored[0][split]
    if missing:
        for split in SPLITS:
            fresh, broken[split] = _run(how, split, missing)
            found[split] |= fresh
            _check_finite(fresh, split, how.embedder.precision)
        if rank() == 0:
            for part in missing:
                _write(cache / keys[part], part, found, broken)
    else:
        how.say(f"features: read from {len(keys)} file{'s' * (len(keys) > 1)} of an earlier pass")
    return {split: _readable(how, split, found[split], broken[split]) for split in SPLITS}


def _run(how: Pass, split: str, wanted: Collection[Part]) -> tuple[dict[str, Tensor], list[Broken]]:
    """Features of all images of a split by name, [n, ...] with zeros where broken; and `ok`, bool [n]."""
    samples, size = how.splits[split], how.batch_size
    blocks = torch.arange(len(samples)).split(size)
    mine, rounds = blocks[rank() :: world_size()], -(-len(blocks) // world_size())
    reader = Blocks(samples, how.shape, "pixels" in wanted)
    loaded = iter(reader.load([Wanted(rows) for rows in mine], how.workers, how.embedder.device.type == "cuda"))
    parts = [part for part in wanted if part != "pixels"]
    blank = _blank(how, parts, "pixels" in wanted)
    out = {name: torch.zeros(len(samples), *row.shape, dtype=row.dtype) for name, row in blank.items()}
    broken: list[Broken] = []
    with Bar(f"{split} images", len(samples), how.say) as bar:
        for number in range(rounds):
            block = next(loaded, None)  # in the last round some processes have none
            rows = {name: row.expand(size, *row.shape).clone() for name, row in blank.items()}
            if block is not None:
                broken += block.broken
                given = how.embedder(block.images, parts) | {"ok": block.ok}
                given |= {} if block.pixels is None else {"pixels": block.pixels}
                for name, value in given.items():
                    rows[name][: len(value)] = value
            first = number * size * world_size()
            for name, value in rows.items():
                together = gather_no_grad(value.to(how.embedder.device)).cpu()[: len(samples) - first]
                out[name][first : first + len(together)] = together
            bar.move(min(first + size * world_size(), len(samples)))
    return out, [each for part in gather_objects(broken) for each in part]


def _blank(how: Pass, parts: Collection[Part], pixels: bool) -> dict[str, Tensor]:
    """One row of every kind of feature, zeros on the CPU."""
    image = torch.zeros(1, *how.shape, dtype=torch.uint8)
    rows = {name: torch.zeros_like(value[0], device="cpu") for name, value in how.embedder(image, parts).items()}
    if pixels:
        rows["pixels"] = torch.zeros_like(shrunk(image)[0])
    return rows | {"ok": torch.tensor(False)}


def _readable(how: Pass, split: str, found: dict[str, Tensor], broken: list[Broken]) -> Split:
    counter = Counter("training" if split == "train" else "test", how.splits[split], how.max_broken, how.say)
    counter.note(broken)
    counter.check(len(counter.names))  # of all processes already
    ok = found["ok"]
    if not ok.any():
        raise ValueError(f"none of the {len(ok)} {counter.what} images can be read")
    rows = ok.nonzero()[:, 0]
    kept = {name: value if ok.all() else value[rows] for name, value in found.items() if name != "ok"}
    return Split(kept, how.splits[split].labels[rows], rows)


def _check_finite(found: Mapping[str, Tensor], split: str, precision: str) -> None:
    for name, value in found.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"the encoder's {name} of {split} images are not finite in {precision}: broken weights")


def _write(folder: Path, part: Part, found: dict[str, dict[str, Tensor]], broken: dict[str, list[Broken]]) -> None:
    prefixes = ("block", "avg") if part == "blocks" else (part,)
    names = {name for name in found["train"] if name.startswith((*prefixes, "ok"))}
    tensors = {f"{split}.{name}": found[split][name].contiguous() for split in SPLITS for name in names}
    with publish(folder) as path:
        try:
            save_file(tensors, path / _FILE)
        except SafetensorError as error:
            raise StorageError(f"cannot write {folder}: {error}") from error
        (path / _FACTS).write_text(json.dumps({split: broken[split] for split in SPLITS}) + "\n")


def _read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[Broken]]] | None:
    """What `_write` wrote; None if there is nothing, or nothing readable."""
    try:
        tensors = load_file(folder / _FILE)
        broken = json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError, SafetensorError):
        return None
    split_of: dict[str, dict[str, Tensor]] = {split: {} for split in SPLITS}
    for name, tensor in tensors.items():
        split, _, rest = name.partition(".")
        split_of[split][rest] = tensor.clone()  # rows drawn at random from the mapped file would wait for the disk
    return split_of, {split: [Broken(*each) for each in broken[split]] for split in SPLITS}
