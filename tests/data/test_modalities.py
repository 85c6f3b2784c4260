"""Other modalities show the same part of an image, keep their values, and are found, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hybrid_ssl.data.decode import Decoder
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.modalities import Modalities, as_map, cut_map, derived, fit
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import DataSettings, DirichletMask, ModalitySettings, ViewSettings
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.data.views import Box, cut, draw_boxes
from hybrid_ssl.plan import Batch

CLASSES, IMAGES = 3, 6
VIEWS = {
    "rgb": ViewSettings(size=32, hflip=0.5),
    "depth": ViewSettings(size=32, like="rgb", modality="depth"),
    "semseg": ViewSettings(size=16, like="rgb", modality="semseg"),
}


def scene(i: int) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A disc before a plane that becomes brighter and nearer to the right: image, depth uint16, labels uint8."""
    plane = np.tile(np.linspace(20, 200, 60), (50, 1))
    labels = Image.new("L", (60, 50), 0)
    draw = ImageDraw.Draw(labels)
    draw.ellipse((5 + 4 * i, 10, 30 + 4 * i, 35), fill=1)
    draw.rectangle((0, 44, 59, 49), fill=255)  # nobody knows what that is
    ids = np.array(labels)
    gray = np.where(ids == 1, 230, plane).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB"), (gray.astype(np.uint16) * 257), ids


def write_folders(folder: Path) -> DataSettings:
    for name in ("rgb", "depth", "semseg"):
        (folder / name / "deep").mkdir(parents=True)
    for i in range(IMAGES):
        image, depth, labels = scene(i)
        image.save(folder / "rgb" / "deep" / f"{i}.png")
        Image.fromarray(depth).save(folder / "depth" / "deep" / f"{i}.png")
        np.save(folder / "semseg" / "deep" / f"{i}.npy", labels)
    return settings_of(folder, depth={"source": str(folder / "depth")}, semseg={"source": str(folder / "semseg")})


def settings_of(folder: Path, **modalities: dict[str, Any]) -> DataSettings:
    modalities["semseg"] |= {"classes": CLASSES, "unlabelled": 255}
    return DataSettings.model_validate({"source": str(folder / "rgb"), "modalities": modalities})


def write_table(folder: Path) -> DataSettings:
    datasets = pytest.importorskip("datasets")
    scenes = [scene(i) for i in range(IMAGES)]
    table = datasets.Dataset.from_dict(
        {
            "depth_map": [Image.fromarray(depth) for _, depth, _ in scenes],
            "picture": [image for image, _, _ in scenes],
            "ids": [labels.tolist() for _, _, labels in scenes],
        }
    )
    table = table.cast_column("depth_map", datasets.Image()).cast_column("picture", datasets.Image())
    table.to_parquet(folder / "scenes.parquet")
    settings = settings_of(folder, depth={"column": "depth_map"}, semseg={"column": "ids"})
    return settings.model_copy(update={"source": str(folder / "scenes.parquet"), "image": "picture"})


def loader_of(data: DataSettings, workers: int = 0, views: dict[str, ViewSettings] = VIEWS) -> Loader:
    mask = DirichletMask(kind="dirichlet", view="rgb", beside=["depth", "semseg"], ratio=0.8)
    grids = dict.fromkeys(views, (4, 4))
    return Loader(
        open_source(data), data, views, {"dirichlet": mask}, grids=grids, stride=8, batch_size=3, workers=workers
    )


def first_batch(data: DataSettings) -> Batch:
    return next(loader_of(data).iterate())


def assert_same_geometry(batch: Batch) -> None:
    gray = batch.views["rgb"][:, :1].float() / 255  # [3, 1, 32, 32]
    depth, labels = batch.views["depth"], batch.views["semseg"]
    assert depth.dtype == torch.float32 and depth.shape == (3, 1, 32, 32)
    assert (depth - gray).abs().mean() < 0.02  # bicubic and bilinear
    assert labels.dtype == torch.int16 and labels.shape == (3, 1, 16, 16)
    assert set(labels.unique().tolist()) <= {0, 1, CLASSES}
    disc = (gray > 0.87).float()
    assert (torch.nn.functional.avg_pool2d(disc, 2).round() - (labels == 1).float()).abs().mean() < 0.06


@pytest.mark.parametrize("write", [write_folders, write_table])
def test_modalities_show_the_same_part_and_keep_their_ids(write: Any, tmp_path: Path) -> None:
    batch = first_batch(write(tmp_path))
    assert_same_geometry(batch)
    assert batch.masks["dirichlet"].shape == (3, 48) and ((~batch.masks["dirichlet"]).sum(1) == 9).all()


def test_folders_and_columns_give_the_same_bits(tmp_path: Path) -> None:
    folders, table = first_batch(write_folders(tmp_path)), first_batch(write_table(tmp_path))
    assert all(torch.equal(folders.views[name], table.views[name]) for name in VIEWS)


def test_workers_change_nothing(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    for one, two, _ in zip(loader_of(data).iterate(), loader_of(data, workers=2).iterate(), range(3), strict=False):
        assert all(torch.equal(one.views[name], two.views[name]) for name in VIEWS)
        assert torch.equal(one.masks["dirichlet"], two.masks["dirichlet"])


def test_other_modalities_change_no_image(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    alone = Loader(open_source(data), data, {"rgb": VIEWS["rgb"]}, {}, grids={}, stride=8, batch_size=3)
    assert torch.equal(next(alone.iterate()).views["rgb"], first_batch(data).views["rgb"])


def test_a_part_of_the_data_keeps_its_partners(tmp_path: Path) -> None:
    data = write_folders(tmp_path).model_copy(update={"limit": 4})
    assert_same_geometry(first_batch(data))


def test_image_with_a_broken_map_is_replaced_and_named(tmp_path: Path) -> None:
    data = write_folders(tmp_path).model_copy(update={"max_broken": 0.5})
    (tmp_path / "depth" / "deep" / "2.png").write_bytes(b"no picture")
    Image.new("L", (30, 50)).save(tmp_path / "depth" / "deep" / "4.png")
    loader = loader_of(data)
    batches = loader.iterate()
    seen = [next(batches) for _ in range(2)]
    assert sorted(loader.broken) == [2, 4] and "its depth" in loader.broken[2].reason
    assert "is 50 x 30 pixels, the image 50 x 60" in loader.broken[4].reason
    assert all(not set(batch.ids.tolist()) & {2, 4} for batch in seen if batch.ids is not None)
    assert_same_geometry(seen[0])


# Boxes


@pytest.mark.parametrize("flip", [False, True])
def test_labels_are_cut_by_the_nearest_pixel(flip: bool) -> None:
    ids = torch.arange(30 * 40, dtype=torch.int16).view(1, 30, 40)
    found = cut_map(ids, Box(4, 8, 20, 10, hflip=flip, vflip=flip), (10, 5))
    rows, columns = torch.arange(10) * 2 + 5, torch.arange(5) * 2 + 9  # centre of two pixels: the second
    expected = ids[:, rows][:, :, columns]
    assert torch.equal(found, expected.flip(-1).flip(-2) if flip else expected)
    assert found.dtype == torch.int16 and found.is_contiguous()


def test_continuous_maps_are_cut_as_images_are() -> None:
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    for box in draw_boxes(ViewSettings(size=16, crops=4), 40, 50, keyed(0, 0, 0, "box")):
        exact = cut_map(image.float(), box, (16, 16))
        assert (exact - cut(image, box, (16, 16), "bilinear").float()).abs().max() <= 1


def test_smaller_map_is_brought_to_the_size_of_the_image() -> None:
    ids = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.int16)
    assert torch.equal(fit(ids, (6, 6)), ids.repeat_interleave(3, 1).repeat_interleave(3, 2))
    with pytest.raises(ValueError, match="not one shape"):
        fit(ids, (6, 9))


# Values


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.array([[0, 65535]], np.uint16), [0, 1]),
        (np.array([[0, 65535]], np.int32), [0, 1]),
        (np.array([[0, 51]], np.uint8), [0, 0.2]),
        (np.array([[0.5, 80.0]], np.float64), [0.5, 80]),
    ],
    ids=lambda x: str(getattr(x, "dtype", "")),
)
def test_integers_are_scaled_and_floats_stay(stored: np.ndarray, expected: list[float]) -> None:
    found = as_map(stored, ModalitySettings(column="depth"))
    torch.testing.assert_close(found, torch.tensor([[expected]], dtype=torch.float32))


def test_palette_pictures_give_their_indices() -> None:
    image = Image.new("P", (4, 3), 2)
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    found = as_map(Decoder().stored(image), ModalitySettings(column="ids", classes=3))
    assert torch.equal(found, torch.full((1, 3, 4), 2, dtype=torch.int16))


@pytest.mark.parametrize(
    ("stored", "more", "sentence"),
    [
        (np.array([[0, 7]]), {"classes": 5}, r"has id 7, but its 5 classes are 0 .. 4"),
        (np.array([[0, 5]]), {"classes": 5}, r"has id 5"),
        (np.array([[0.0, 1.0]]), {"classes": 5}, "label map holds integers"),
        (np.array([[0.0, np.nan]]), {}, "NaN"),
        (np.zeros((4, 4, 3)), {}, "1 channel"),
    ],
    ids=["id", "id of no label", "float ids", "nan", "channels"],
)
def test_maps_that_cannot_be_meant_are_refused(stored: np.ndarray, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        as_map(stored, ModalitySettings(column="depth", **more))


def test_stand_ins_are_brightness_edges_and_levels() -> None:
    ramp = (torch.arange(8).repeat(8, 1) * 32).to(torch.uint8).expand(3, 8, 8)
    settings = {name: ModalitySettings(derive=name) for name in ("gray", "sobel")}
    torch.testing.assert_close(derived(settings["gray"], ramp), ramp[:1] / 255)
    edges: Tensor = derived(settings["sobel"], ramp)
    torch.testing.assert_close(edges[:, :, 1:-1], torch.full((1, 8, 6), 32 / 255))
    levels = derived(ModalitySettings(derive="levels", classes=4), ramp)
    assert levels.dtype == torch.int16 and levels[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert derived(settings["gray"], ramp[:1]).shape == (1, 8, 8)  # images of one channel


# Where they are from


def test_missing_and_doubled_pictures_are_named(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "depth" / "deep" / "0.bmp")
    with pytest.raises(ValueError, match=r"two pictures called 'deep/0'"):
        loader_of(data)
    (tmp_path / "depth" / "deep" / "0.bmp").unlink()
    (tmp_path / "depth" / "deep" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"data.modalities.depth has no picture for 1 of 6 images, e.g. 'deep/3'"):
        loader_of(data)


def test_columns_of_folders_and_unknown_columns_are_refused(tmp_path: Path) -> None:
    data = write_folders(tmp_path)
    column = {"depth": ModalitySettings(column="depth")}
    with pytest.raises(ValueError, match="there are no columns, so none is called 'depth'"):
        open_source(data.model_copy(update={"modalities": column}))
    table = write_table(tmp_path)
    with pytest.raises(ValueError, match=r"has no column 'depth'; it has: depth_map, picture, ids"):
        open_source(table.model_copy(update={"modalities": column}))


def test_names_of_files_are_no_names_of_rows(tmp_path: Path) -> None:
    folders, table = write_folders(tmp_path), open_source(write_table(tmp_path))
    with pytest.raises(ValueError, match="no files in a folder"):
        Modalities({"depth": folders.modalities["depth"]}, table, Decoder())


def test_streams_are_refused(tmp_path: Path) -> None:
    data = write_table(tmp_path).model_copy(update={"streaming": True, "limit": IMAGES})
    with pytest.raises(ValueError, match=r"data.modalities.depth needs images that can be looked up"):
        loader_of(data)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"column": "a", "derive": "gray"}, {"derive": "levels"}, {"derive": "gray", "classes": 3},
     {"derive": "sobel", "channels": 2}],
    ids=str,
)  # fmt: skip
def test_modality_is_from_one_place(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"one of: a `column`|classes|one channel"):
        ModalitySettings(**wrong)


@pytest.mark.parametrize("wrong", [{"like": None}, {"gray": 0.2}, {"blur": 0.1}], ids=str)
def test_view_of_a_modality_is_like_another_and_without_colour(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"set `like`|are for images, not for depth"):
        ViewSettings(**{"like": "rgb", "modality": "depth", **wrong})


def test_unknown_modality_is_refused(tmp_path: Path) -> None:
    views = VIEWS | {"depth": ViewSettings(size=32, like="rgb", modality="normals")}
    with pytest.raises(ValueError, match=r"a view shows modality 'normals'; data.modalities has: depth, semseg"):
        loader_of(write_folders(tmp_path), views=views)
