"""Streaming: shards that are read one after another, for data too large to index or to download.

The order of shards is a permutation from (seed, epoch); rank r of W takes every W-th of them and draws from a buffer of
images with a keyed generator. The main process walks the shards and hands out references, workers load and decode, so
that the number of workers changes nothing. What is looser than with indexed sources:

- Resume walks the current epoch's shards again up to the step, without decoding: exact with the same number of
  processes, at the cost of the walk.
- Another number of processes is another order, and ranks with shorter shards start over within an epoch.
- A broken image is replaced by another one of its micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from .order import BatchOrder, MicroBatch, keyed, permutation
from .sources import Source
from .tables import find_columns, load, payload, pick_split
from .tars import find_shards, index, pread

_BUFFER = 1000  # images; of 100 kB each, 100 MB in each process


class Item(NamedTuple):
    """An image that is still in its shard, or undecoded."""

    id: int
    ref: Any
    """what `Stream.load` turns into bytes"""
    label: int | None
    name: str


class Stream(Source):
    """A source that is only read in sequence. `len` is the number of images that count as one epoch."""

    def __init__(self, shards: int, images: int, fingerprint: str, sentence: str) -> None:
        self.shards, self._images, self.fingerprint, self._sentence = shards, images, fingerprint, sentence

    def __len__(self) -> int:
        return self._images

    def describe(self) -> str:
        return f"{self._sentence}, streamed; {len(self):,} images are an epoch"

    def sample(self, count: int) -> Iterator[tuple[int, Any, int | None]]:
        """The first images of as many shards as it takes."""
        for shard in range(self.shards):
            for item in self.read_shard(shard):
                if count <= 0:
                    return
                count -= 1
                yield item.id, self.load(item.ref), item.label

    def read_shard(self, shard: int) -> Iterator[Item]:
        raise NotImplementedError

    def load(self, ref: Any) -> Any:
        """Encoded bytes, a path or an array. `ValueError` if it cannot be read."""
        raise NotImplementedError


class TarStream(Stream):
    """Tar files; only headers are read in the main process."""

    def __init__(self, shards: Sequence[str], images: int) -> None:
        self._paths = list(shards)
        super().__init__(len(shards), images, _digest(self._paths), f"{len(shards)} tar file(s) such as {shards[0]}")

    def read_shard(self, shard: int) -> Iterator[Item]:
        path = self._paths[shard]
        for number, member in enumerate(index(path)):
            label = member.label if isinstance(member.label, int) else None  # text is only numbered with all in sight
            yield Item(_id(path, number), (path, member.offset, member.size), label, f"{member.name} in {path}")

    def load(self, ref: Any) -> Any:
        return pread(*ref)


class TableStream(Stream):
    """A Hugging Face `IterableDataset`: its rows pass through the main process, undecoded."""

    def __init__(self, dataset: Any, images: int, image: str | None, label: str | None, title: str) -> None:
        dataset, self._image, self._label = find_columns(dataset, image, label, title)
        self._dataset, self._title = dataset, title
        super().__init__(dataset.num_shards, images, _digest([title]), title)

    def read_shard(self, shard: int) -> Iterator[Item]:
        rows = self._dataset.shard(num_shards=self.shards, index=shard)
        for number, row in enumerate(rows):
            label = row[self._label] if self._label else None
            name = f"row {number} of shard {shard} of {self._title}"
            yield Item(_id(str(shard), number), row[self._image], label if isinstance(label, int) else None, name)

    def load(self, ref: Any) -> Any:
        return payload(ref)


class StreamOrder(BatchOrder):
    """One rank's micro-batches of a stream, from an optimizer step on."""

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        micro_batch: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        super().__init__(len(stream), batch_size, micro_batch, seed, rank=rank, world=world, start=start)
        if stream.shards < self.world:
            raise ValueError(
                f"{stream.describe()}: {stream.shards} shard(s) for {self.world} processes, each needs one: "
                "leave data.streaming out, or split the data into more files"
            )
        self.stream = stream

    def __iter__(self) -> Iterator[MicroBatch]:
        step = self.start
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            items = self._read(epoch)
            for _ in range(first * self.accumulation * self.micro_batch):
                next(items)
            for number in range((self.steps_per_epoch - first) * self.accumulation):
                chosen = tuple(next(items) for _ in range(self.micro_batch))
                now, part = step + number // self.accumulation, number % self.accumulation
                yield MicroBatch(now, epoch, tuple(item.id for item in chosen), chosen, self._place(part))
            step += self.steps_per_epoch - first

    def _read(self, epoch: int) -> Iterator[Item]:
        """This rank's shards, again and again; every image comes once in a pass."""
        mine = permutation(self.stream.shards, self.seed, epoch)[self.rank :: self.world].tolist()
        rng = keyed(self.seed, epoch, self.rank, "stream")
        while True:
            empty = True
            for item in _shuffle((item for shard in mine for item in self.stream.read_shard(shard)), rng):
                empty = False
                yield item
            if empty:
                raise ValueError(f"no images in the shards of process {self.rank}: {self.stream.describe()}")


def open_stream(
    names: Sequence[str],
    images: int | None,
    *,
    split: str,
    config: str | None,
    revision: str | None,
    image: str | None,
    label: str | None,
) -> Stream:
    """Tar files, or anything that `datasets` streams.

    Args:
        images: what counts as an epoch; None: what the data set says of itself.
    """
    title = ", ".join(names)
    shards = find_shards(names)
    if shards:
        return TarStream([str(shard) for shard in shards], _needed(images, title))
    dataset = pick_split(load(names, config, revision, streaming=True), split, title)
    known = getattr((dataset.info.splits or {}).get(split), "num_examples", None) or None
    return TableStream(dataset, _needed(images or known, title), image, label, title)


def _needed(images: int | None, title: str) -> int:
    if images is None:
        raise ValueError(f"{title} does not say how many images it has: set data.limit to the length of an epoch")
    return images


def _shuffle(items: Iterator[Item], rng: Random) -> Iterator[Item]:
    """Give out a random image of a full buffer for each one that comes in; in the end what is left."""
    buffer: list[Item] = []
    for item in items:
        if len(buffer) < _BUFFER:
            buffer.append(item)
            continue
        place = int(rng.random() * len(buffer))
        buffer[place], item = item, buffer[place]
        yield item
    noise = [rng.random() for _ in buffer]
    yield from (buffer[i] for i in sorted(range(len(buffer)), key=noise.__getitem__))


def _id(shard: str, number: int) -> int:
    """63 bits, the same wherever the image turns up."""
    digest = hashlib.blake2b(f"{shard}/{number}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _digest(names: Sequence[str]) -> str:
    return hashlib.blake2b("\0".join(names).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
