"""Mean and standard deviation are those of the pixels, of the recipe, or ImageNet's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybrid_ssl.data.settings import DataSettings
from hybrid_ssl.data.sources import open_named
from hybrid_ssl.data.stats import resolve_mean_std


def write(root: Path, channels: int = 3) -> np.ndarray:
    arrays = np.random.default_rng(0).integers(0, 256, (6, 9, 7, channels), dtype=np.uint8)
    arrays[..., 0] //= 2
    for i, array in enumerate(arrays):
        np.save(root / f"{i}.npy", array)
    return arrays


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_measured_statistics_are_those_of_the_pixels(tmp_path: Path, channels: int) -> None:
    values = write(tmp_path, channels) / 255
    data = DataSettings(source=str(tmp_path), channels=channels, mean="auto", std="auto")
    mean, std = resolve_mean_std(data, open_named(str(tmp_path)))
    assert mean == pytest.approx(values.mean((0, 1, 2)).tolist(), abs=1e-5)
    assert std == pytest.approx(values.std((0, 1, 2)).tolist(), abs=1e-5)


def test_broken_images_are_left_out_and_flat_ones_have_a_floor(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    data = DataSettings(source=str(tmp_path), mean="auto", std="auto")
    mean, std = resolve_mean_std(data, open_named(str(tmp_path)))
    assert mean == [0.2] * 3 and std == [0.001] * 3
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be measured"):
        resolve_mean_std(data, open_named(str(tmp_path)))


def test_imagenet_and_given_numbers(tmp_path: Path) -> None:
    write(tmp_path)
    source = open_named(str(tmp_path))
    assert resolve_mean_std(DataSettings(source="-"), source) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert resolve_mean_std(DataSettings(source="-", channels=1), source) == ([0.449], [0.226])
    given = DataSettings(source="-", channels=2, mean=[0.1, 0.2], std=[0.3, 0.4])
    assert resolve_mean_std(given, source) == ([0.1, 0.2], [0.3, 0.4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 5}, "data.mean=auto"),
        ({"mean": [0.5]}, "1 numbers for 3 channels"),
        ({"std": [0.5, 0.5, 0.0]}, "must be positive"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        resolve_mean_std(DataSettings(source="-", **changes), open_named(str(tmp_path)))
