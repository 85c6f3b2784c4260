"""Streams: every image once in a pass, any number of workers, exact resume, another shard for each process."""

from __future__ import annotations

import io
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.data.labelled import read_images
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.settings import DataSettings, RandomMask, ViewSettings
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.data.stats import measure
from hybrid_ssl.data.streams import Stream
from hybrid_ssl.plan import Batch

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # a shuffled iterator would sleep 5 s when it is closed


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (i, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tars(root: Path) -> str:
    for shard in range(4):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(shard * 10, shard * 10 + 10):
                for suffix, data in ((".png", png(i)), (".cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(f"{i}{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(root)


def write_parquet(root: Path) -> str:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for shard in range(4):
        rows = range(shard * 10, shard * 10 + 10)
        content = {"image": [{"bytes": png(i), "path": None} for i in rows], "label": [i % 3 for i in rows]}
        datasets.Dataset.from_dict(content, features=features).to_parquet(root / f"train-{shard:05d}-of-00004.parquet")
    return str(root)


@pytest.fixture(params=[write_tars, write_parquet], ids=["tar", "parquet"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataSettings:
    return DataSettings(source=request.param(tmp_path), streaming=True, limit=40)


def batches(data: DataSettings, count: int, step: int = 0, **changes: Any) -> list[Batch]:
    source = open_source(data)
    options: dict[str, Any] = {"grids": {"plain": (2, 2)}, "stride": 4, "batch_size": 8, "seed": 1} | changes
    masks = {"m": RandomMask(kind="random", view="plain", ratio=0.5)}
    loader = Loader(source, data, {"plain": ViewSettings(size=8)}, masks, **options)
    return list(islice(loader.iterate(step), count))


def reds(found: list[Batch]) -> list[int]:
    return [int(view[0, 0, 0]) for batch in found for view in batch.views["plain"]]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.views["plain"], y.views["plain"]) and torch.equal(x.masks["m"], y.masks["m"])
        for x, y in zip(a, b, strict=True)
    )


def test_an_epoch_holds_every_image_once_with_its_label(data: DataSettings) -> None:
    found = batches(data, 10)
    first, second = reds(found[:5]), reds(found[5:])
    assert sorted(first) == sorted(second) == list(range(40)) and first != second and first != sorted(first)
    labels = [int(label) for batch in found[:5] for label in batch.labels]  # type: ignore[union-attr]
    assert labels == [red % 3 for red in first]


def test_workers_change_no_bit(data: DataSettings) -> None:
    assert same(batches(data, 7), batches(data, 7, workers=2))


@pytest.mark.parametrize("step", [2, 5, 6])
def test_resume_continues_to_the_bit(data: DataSettings, step: int) -> None:
    assert same(batches(data, 8)[step:], batches(data, 8 - step, step=step))


def test_processes_read_different_images(data: DataSettings) -> None:
    ranks = [reds(batches(data, 5, world=2, rank=rank)) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == list(range(40))


def test_ids_name_an_image_for_good(data: DataSettings) -> None:
    pairs = {(int(i), red) for batch in batches(data, 10) for i, red in zip(batch.ids, reds([batch]), strict=True)}  # type: ignore[arg-type]
    assert len(pairs) == 40 and len({i for i, _ in pairs}) == 40


def test_too_few_shards_and_an_unknown_length_are_refused(data: DataSettings) -> None:
    with pytest.raises(ValueError, match=r"4 shard\(s\) for 8 processes"):
        batches(data, 1, world=8)
    with pytest.raises(ValueError, match="set data.limit"):
        open_source(data.model_copy(update={"limit": None}))


def test_broken_images_are_replaced_within_the_micro_batch(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(16):
            content = b"broken" if i == 5 else png(i)
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = DataSettings(source=str(tmp_path / "a.tar"), streaming=True, limit=16, max_broken=0.1)
    alone = batches(data, 4)
    assert 5 not in reds(alone) and same(alone, batches(data, 4, workers=2))


def test_statistics_and_evaluation_read_the_first_images(data: DataSettings) -> None:
    source = open_source(data)
    assert isinstance(source, Stream) and "40 images are an epoch" in source.describe()
    mean, _ = measure(source, Decoder(), images=10)
    assert mean[0] == pytest.approx(4.5 / 255, abs=1e-4)
    read = read_images(source, 12, (8, 8), data)
    assert read.images[:, 0, 0, 0].tolist() == list(range(12))


def test_saved_data_can_be_streamed(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    datasets.load_dataset("parquet", data_dir=str(tmp_path), split="train").save_to_disk(tmp_path / "saved")
    data = DataSettings(source=str(tmp_path / "saved"), streaming=True, limit=40)
    assert sorted(reds(batches(data, 5))) == list(range(40))
