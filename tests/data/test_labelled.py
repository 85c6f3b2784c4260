"""The probe's images are the same in every call, cut in the centre, and its two halves share none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from hybrid_ssl.data.labelled import open_probe, read_images
from hybrid_ssl.data.settings import DataSettings, ProbeSettings
from hybrid_ssl.data.sources import open_named, open_source


def write(root: Path, names: list[str]) -> str:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (i, 0, 0)).save(root / name)
    return str(root)


def test_images_are_a_fixed_sample_of_one_size(tmp_path: Path) -> None:
    source = open_named(write(tmp_path, [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(30)]))
    data = DataSettings(source="-")
    read = read_images(source, 12, (8, 8), data)
    assert read.images.shape == (12, 3, 8, 8) and read.images.dtype == torch.uint8
    assert read.labels is not None and len(set(read.labels.tolist())) == 2
    assert torch.equal(read.labels, source.labels[read.ids])  # type: ignore[index]
    again = read_images(source, 12, (8, 8), data)
    assert torch.equal(read.images, again.images) and torch.equal(read.ids, again.ids)
    assert len(read_images(source, 100, (8, 8), data).ids) == 30


def test_centre_is_taken_and_broken_images_left_out(tmp_path: Path) -> None:
    pixels = torch.zeros(10, 30, 3, dtype=torch.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    read = read_images(open_named(str(tmp_path)), 5, (5, 5), DataSettings(source="-"))
    assert read.ids.tolist() == [0] and read.labels is None and (read.images == 200).all()
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the images"):
        read_images(open_named(str(tmp_path)), 5, (5, 5), DataSettings(source="-"))


def test_probe_takes_the_test_split_of_the_source(tmp_path: Path) -> None:
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("cat", "dog") for i in range(3)]
    data = DataSettings(source=write(tmp_path, names), probe=ProbeSettings())
    source = open_source(data)
    train, test = open_probe(data, source)
    assert train is source and len(test) == 6 and "test" in test.name(0)


def test_probe_holds_out_images_where_there_is_no_test_split(tmp_path: Path) -> None:
    root = write(tmp_path, [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(40)])
    data = DataSettings(source=root, probe=ProbeSettings(test_images=5))
    train, test = open_probe(data)
    names = [{part.name(i) for i in range(len(part))} for part in (train, test)]
    assert (len(train), len(test)) == (35, 5) and not names[0] & names[1]
    assert [train.read(i)[1] for i in range(35)] == train.labels.tolist()  # type: ignore[union-attr]


def test_probe_with_its_own_sources_numbers_classes_alike(tmp_path: Path) -> None:
    train = write(tmp_path / "one", ["cat/0.png", "dog/1.png", "owl/2.png"])
    test = write(tmp_path / "two", ["dog/0.png", "owl/1.png", "yak/2.png"])
    data = DataSettings(source="-", probe=ProbeSettings(source=train, test_source=test, test_split="train"))
    opened = open_probe(data)
    assert opened.test.labels is not None and opened.test.labels.tolist() == [1, 2, 3]
    assert opened.test.read(0)[1] == 1


def test_probe_of_a_stream_needs_its_own_source() -> None:
    with pytest.raises(ValueError, match="set data.probe.source"):
        open_probe(DataSettings(source="somewhere", streaming=True, probe=ProbeSettings()))


def test_probe_without_labels_is_refused(tmp_path: Path) -> None:
    data = DataSettings(source=write(tmp_path, ["0.png", "1.png"]), probe=ProbeSettings())
    with pytest.raises(ValueError, match="data.probe needs labels.*set data.probe.source"):
        open_probe(data)
