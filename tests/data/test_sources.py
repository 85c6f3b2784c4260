"""Every form of source gives the same images, and every mistake one sentence that helps."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.data.settings import DataSettings
from hybrid_ssl.data.sources import Images, open_named, open_source

CLASSES = ["cat", "dog"]


def png(i: int) -> bytes:
    """Number `i` as a flat colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (i, 2 * i, 255 - i)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i))


def table(rows: int = 6) -> datasets.Dataset:
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    content = {"picture": [{"bytes": png(i), "path": None} for i in range(rows)], "label": [i % 2 for i in range(rows)]}
    return datasets.Dataset.from_dict(content, features=features)


def make_folder(root: Path) -> str:
    write_tree(root / "images", [f"{CLASSES[i % 2]}/{i}.png" for i in range(6)])
    return str(root / "images")


def make_list(root: Path) -> str:
    write_tree(root, [f"files/{i}.png" for i in range(6)])
    (root / "list.txt").write_text("".join(f"files/{i}.png\t{CLASSES[i % 2]}\n" for i in range(6)))
    return str(root / "list.txt")


def make_parquet(root: Path) -> str:
    table().to_parquet(root / "all.parquet")
    return str(root / "all.parquet")


def make_parquet_folder(root: Path) -> str:
    (root / "shards" / "data").mkdir(parents=True)
    table().select(range(3)).to_parquet(root / "shards" / "data" / "train-00000-of-00002.parquet")
    table().select(range(3, 6)).to_parquet(root / "shards" / "data" / "train-00001-of-00002.parquet")
    table().select([5]).to_parquet(root / "shards" / "data" / "test-00000-of-00001.parquet")
    return str(root / "shards")


def make_saved(root: Path) -> str:
    table().save_to_disk(root / "saved")
    return str(root / "saved")


def make_saved_splits(root: Path) -> str:
    datasets.DatasetDict({"train": table(), "test": table(2)}).save_to_disk(root / "saved_splits")
    return str(root / "saved_splits")


def make_arrow(root: Path) -> str:
    make_saved(root)
    return str(next((root / "saved").glob("*.arrow")))


def make_tar(root: Path, name: str = "a.tar", rows: range = range(6)) -> str:
    with tarfile.open(root / name, "w") as tar:
        for i in rows:
            for suffix, data in ((".png", png(i)), (".cls", CLASSES[i % 2].encode()), (".txt", b"a caption")):
                info = tarfile.TarInfo(f"part/{i:04d}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(root / name)


def make_tar_folder(root: Path) -> str:
    (root / "tars").mkdir()
    make_tar(root / "tars", "0.tar", range(3))
    make_tar(root / "tars", "1.tar", range(3, 6))
    return str(root / "tars")


MAKERS: list[Callable[[Path], str]] = [
    make_folder,
    make_list,
    make_parquet,
    make_parquet_folder,
    make_saved,
    make_saved_splits,
    make_arrow,
    make_tar,
    make_tar_folder,
]


def first_channel(source: Images, i: int) -> int:
    return int(Decoder()(source.read(i)[0])[0, 0, 0])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_form_gives_the_same_images_and_labels(make: Callable[[Path], str], tmp_path: Path) -> None:
    source = open_named(make(tmp_path))
    content = {first_channel(source, i): source.read(i)[1] for i in range(len(source))}
    assert content == {i: i % 2 for i in range(6)} and source.class_names == CLASSES
    assert source.labels is not None and source.labels.tolist() == [source.read(i)[1] for i in range(6)]
    assert source.describe().startswith("6 images") and source.name(0).isprintable() and source.fingerprint
    assert open_named(make_again(make, tmp_path)).fingerprint == source.fingerprint


def make_again(make: Callable[[Path], str], tmp_path: Path) -> str:
    (tmp_path / "moved").mkdir()
    return make(tmp_path / "moved")


@pytest.mark.parametrize("make", [make_folder, make_parquet, make_saved, make_tar], ids=lambda make: make.__name__)
def test_fingerprint_changes_with_the_data(make: Callable[[Path], str], tmp_path: Path) -> None:
    before = open_named(make(tmp_path)).fingerprint
    if make is make_folder:
        write_tree(tmp_path / "images", ["cat/new.png"])
        after = open_named(str(tmp_path / "images"))
    elif make is make_tar:
        after = open_named(make_tar(tmp_path, "b.tar", range(7)))
    else:
        table(7).to_parquet(tmp_path / "more.parquet")
        after = open_named(str(tmp_path / "more.parquet"))
    assert after.fingerprint != before and len(after) == 7


def test_flat_folder_has_no_labels_and_other_files_are_counted(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a.png", "b.PNG", "sub/c.png"])
    for name in ("notes.txt", ".DS_Store", "._a.png", "sub/.hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    source = open_named(str(tmp_path))
    assert len(source) == 3 and source.labels is None and source.read(0)[1] is None
    assert source.describe() == f"3 images in {tmp_path} (2 folders), 4 other files ignored"


def test_several_folders_are_put_together(tmp_path: Path) -> None:
    write_tree(tmp_path / "one", ["cat/0.png", "dog/1.png"])
    write_tree(tmp_path / "two", ["dog/2.png", "owl/3.png"])
    source = open_named([str(tmp_path / "one"), str(tmp_path / "two")])
    assert len(source) == 4 and source.class_names == ["cat", "dog", "owl"]
    assert source.labels is not None and source.labels.tolist() == [0, 1, 1, 2]


def test_split_folders_are_told_from_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png"])
    assert len(open_named(str(tmp_path))) == 2 and len(open_named(str(tmp_path), split="test")) == 2
    with pytest.raises(ValueError, match="no split 'val'; it has: test, train"):
        open_named(str(tmp_path), split="val")


def test_links_and_odd_files_are_counted_once(tmp_path: Path) -> None:
    write_tree(tmp_path / "images", ["a/0.png", "b/1.png"])
    write_tree(tmp_path / "elsewhere", ["2.png", "3.png"])
    root = tmp_path / "images"
    (root / "a" / "up").symlink_to(root)  # a loop
    (root / "self").symlink_to(root / "self")
    (root / "again.png").symlink_to(root / "a" / "0.png")  # already there
    (root / "outside.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (root / "outside_again.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "dangling.png").symlink_to(root / "nothing.png")
    (root / "directory.png").mkdir()
    os.mkfifo(root / "pipe.png")  # reading it would block for ever
    source = open_named(str(root))
    assert sorted(Path(source.name(i)).name for i in range(len(source))) == ["0.png", "1.png", "2.png", "3.png"]
    assert source.describe().endswith("6 other files ignored")  # again, outside twice, dangling, self, pipe


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    for i, name in enumerate([b"caf\xe9.png", "日本.png".encode(), b"new\nline.png"]):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(png(i))
    source = open_named(str(tmp_path))
    assert sorted(first_channel(source, i) for i in range(3)) == [0, 1, 2]
    names = [source.name(i) for i in range(3)]
    assert all(name.isprintable() for name in names) and any("caf\\xe9" in name for name in names)


def test_list_without_labels_and_with_numbers(tmp_path: Path) -> None:
    write_tree(tmp_path, ["0.png", "1.png"])
    (tmp_path / "plain.txt").write_text(f"0.png\n\n{tmp_path}/1.png\n")
    assert open_named(str(tmp_path / "plain.txt")).labels is None
    (tmp_path / "numbers.txt").write_text("0.png\t7\n1.png\t-1\n")
    numbered = open_named(str(tmp_path / "numbers.txt"))
    assert numbered.labels is not None and numbered.labels.tolist() == [7, -1] and numbered.class_names is None


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "note": ["x", "y"],
        "shot": [png(0), png(1)],
        "thumb": [png(5), png(6)],
        "kind": ["b", "a"],
    }
    datasets.Dataset.from_dict(content).to_parquet(tmp_path / "raw.parquet")
    path = str(tmp_path / "raw.parquet")
    assert first_channel(open_named(path), 1) == 1 and open_named(path).labels is None
    named = open_named(path, image="thumb", label="kind")
    assert first_channel(named, 0) == 5 and named.class_names == ["a", "b"]
    assert named.labels is not None and named.labels.tolist() == [1, 0]
    for columns, message in (
        ({"image": "nothing"}, "no column 'nothing' for data.image; it has: note, shot, thumb, kind"),
        ({"label": "nothing"}, "no column 'nothing' for data.label"),
        ({"label": "shot"}, "labels are integers or text"),
    ):
        with pytest.raises(ValueError, match=message):
            open_named(path, **columns)


def test_schema_that_decodes_or_not_is_overruled(tmp_path: Path) -> None:
    undecoded = table().cast_column("picture", datasets.Image(decode=False))
    undecoded.to_parquet(tmp_path / "raw.parquet")
    assert isinstance(open_named(str(tmp_path / "raw.parquet")).read(0)[0], bytes)
    assert isinstance(open_named(make_parquet(tmp_path)).read(0)[0], bytes)


def test_splits_of_tables(tmp_path: Path) -> None:
    assert len(open_named(make_parquet_folder(tmp_path), split="test")) == 1
    assert len(open_named(make_saved_splits(tmp_path), split="test")) == 2
    with pytest.raises(ValueError, match="no split 'val'; it has: train, test"):
        open_named(str(tmp_path / "saved_splits"), split="val")
    with pytest.raises(ValueError, match="no split 'test'; it has no splits"):
        open_named(make_parquet(tmp_path), split="test")


def test_json_labels_of_tars_and_hostile_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("../../evil.png", png(0)),
            ("../../evil.json", json.dumps({"label": 3}).encode()),
            ("/abs.png", png(1)),
            ("/abs.json", b'{"label": 4, "other": [1]}'),
            ("abs.pyd", b"cos\nsystem\n(S'touch pwned'\ntR."),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    source = open_named(str(tmp_path / "a.tar"))
    assert [first_channel(source, i) for i in range(len(source))] == [0, 1]
    assert source.labels is not None and source.labels.tolist() == [3, 4] and set(tmp_path.rglob("*")) == before


def test_tar_patterns_and_damaged_tars(tmp_path: Path) -> None:
    make_tar_folder(tmp_path)
    assert len(open_named(str(tmp_path / "tars" / "?.tar"))) == 6
    whole = Path(make_tar(tmp_path)).read_bytes()
    source = open_named(str(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(whole[: int(source._places[-1, 1]) + 10])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="bytes early"):
        source.read(5)
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="b.tar is no tar file"):
        open_named(str(tmp_path / "b.tar"))
    (tmp_path / "c.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="compressed tar"):
        open_named(str(tmp_path / "c.tar.gz"))


def test_limit_draws_from_all_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, [f"{'ab'[i // 20]}/{i:02d}.png" for i in range(40)])
    source = open_source(DataSettings(source=str(tmp_path), limit=12))
    assert len(source) == 12 and source.labels is not None and len(set(source.labels.tolist())) == 2
    assert isinstance(source, Images) and [source.read(i)[1] for i in range(12)] == source.labels.tolist()
    assert "data.limit" in source.describe()
    assert torch.equal(source.labels, open_source(DataSettings(source=str(tmp_path), limit=12)).labels)


def test_labels_stay_out_where_a_row_has_none(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("0.png", png(0)), ("0.cls", b"1"), ("1.png", png(1))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert open_named(str(tmp_path / "a.tar")).labels is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: str(root / "nothing"), "nothing does not exist"),
        (lambda root: str(root), r"no images in .* \(1 other file"),
        (lambda root: str(root / "notes.md"), "is a file that is no source"),
        (lambda root: str(root / "none.parquet"), "none.parquet does not exist"),
        (lambda root: str(root / "none.txt"), "none.txt does not exist"),
        (lambda root: [], "empty list"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(make: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(ValueError, match=message) as caught:
        open_named(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_wrong_lists_and_files_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path, ["0.png"])
    for text, message in (
        ("", "is empty"),
        ("0.png\n0.png\tcat\n", "line 2"),
        ("1.png\n", "1.png, which is no file"),
    ):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_named(str(tmp_path / "list.txt"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="bad.parquet' cannot be opened"):
        open_named(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="has no columns"):
        open_named(str(tmp_path), label="label")


def test_hub_name_without_a_network_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    with pytest.raises(ValueError, match="looked up on the Hub.*cannot be reached, and the cache has no copy"):
        open_named("somebody/no_such_data_set")
    assert not datasets.config.HF_HUB_OFFLINE


def test_empty_rows_have_a_reason(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict(
        {"image": [png(0), None]}, features=datasets.Features({"image": datasets.Value("binary")})
    )
    rows.to_parquet(tmp_path / "a.parquet")
    source = open_named(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="is empty"):
        source.read(1)
    assert [i for i, _, _ in source.sample(5)] == [0]


def test_numpy_files_are_images_too(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 5, 7), np.uint8))
    assert Decoder(channels=7)(open_named(str(tmp_path)).read(0)[0]).shape == (7, 4, 5)
