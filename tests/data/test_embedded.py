"""The embedded images are there, balanced and lossless."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from hybrid_ssl.data.embedded import embedded_folder
from hybrid_ssl.data.sources import open_named


@pytest.mark.parametrize(("split", "images"), [("train", 10_000), ("test", 2_000)])
def test_split_has_equally_many_images_of_each_class(split: str, images: int) -> None:
    table = parquet.read_table(embedded_folder("embedded:fashion_mnist") / f"{split}.parquet")
    counts = Counter(table["label"].to_pylist())
    assert len(table) == images and counts == dict.fromkeys(range(10), images // 10)


def test_images_are_28_pixel_gray_and_not_empty() -> None:
    rows = parquet.read_table(embedded_folder("embedded:fashion_mnist") / "test.parquet")["image"].to_pylist()[:50]
    arrays = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows]
    assert all(array.shape == (28, 28) and array.dtype == np.uint8 and array.std() > 5 for array in arrays)


def test_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="embedded:fashion_mnist"):
        embedded_folder("embedded:cifar")


def test_source_opens_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, test = (open_named("embedded:fashion_mnist", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (10_000, 2_000)
    assert test.class_names is not None and test.class_names[9] == "ankle boot"
    assert test.labels is not None and test.labels.bincount().tolist() == [200] * 10
