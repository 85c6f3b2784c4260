"""Other modalities of an image: depth, label maps, or whatever else is known of each of its pixels.

A recipe names them in `data.modalities`: a column of the table that the images are from, folders of pictures that are
called like the images, or something computed from the image itself where there is nothing else. A view with `modality`
is cut by the boxes and flips of the image view that it is `like`. Label maps are resized by the nearest pixel and keep
their ids; continuous maps are floats, for a depth of 16 bits would lose most of its values in 8.

Legend: c channels; a continuous map is float32 [c, H, W], a label map int16 [1, H, W] with id `classes` where a pixel
has no label.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .decode import Decoder
from .settings import ModalitySettings
from .sources import Images, Source, open_named
from .tables import payload
from .views import Box, cut

_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8  # a ramp of 1 a pixel gives 1


class Modalities:
    """Reads the maps of one image at a time, and cuts them like the image.

    Args:
        settings: name -> where it is from; only those that some view shows.
        source: of the images.
        decoder: of the images.
        split: of the images, which folders of other modalities are looked up in as well.

    Raises:
        ValueError: if a column or a picture is missing, or `source` is a stream.
    """

    def __init__(
        self, settings: Mapping[str, ModalitySettings], source: Source, decoder: Decoder, split: str = "train"
    ) -> None:
        self.settings, self.decoder = dict(settings), decoder
        self._partners: dict[str, tuple[Images, list[int]]] = {}
        self._source: Images | None = source if isinstance(source, Images) else None
        for name, each in self.settings.items():
            if each.derive is not None:
                continue
            if self._source is None:
                raise ValueError(
                    f"data.modalities.{name} needs images that can be looked up by number: set data.streaming=false"
                )
            if each.source is not None:
                other = open_named(each.source, split=split)
                self._partners[name] = other, find_partners(name, self._source, other)

    def read(self, i: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Name -> map of image `i` at the image's (height, width); ValueError if one cannot be read or does not fit."""
        maps = {}
        for name, each in self.settings.items():
            if each.derive is None:
                try:
                    maps[name] = fit(as_map(self.decoder.stored(self._payload(name, each, i)), each), size)
                except ValueError as problem:
                    raise ValueError(f"its {name} {problem}") from problem
        return maps

    def cut(self, image: Tensor, maps: Mapping[str, Tensor], name: str, box: Box, size: tuple[int, int]) -> Tensor:
        """Modality `name` of `image` (uint8 [C, H, W]) in `box`, at `size`."""
        each = self.settings[name]
        if each.derive is not None:
            return derived(each, cut(image, box, size, "bilinear"))
        return cut_map(maps[name], box, size)

    def _payload(self, name: str, each: ModalitySettings, i: int) -> Any:
        if each.column is not None:
            assert self._source is not None
            return payload(self._source.cell(i, each.column))
        other, rows = self._partners[name]
        return other.read(rows[i])[0]


def find_partners(name: str, images: Images, others: Images) -> list[int]:
    """For each image the number of the picture in `others` that is called like it, up to the ending."""
    numbers: dict[str, int] = {}
    for i in range(len(others)):
        stem = os.path.splitext(others.key(i))[0]
        if stem in numbers:
            raise ValueError(f"data.modalities.{name} has two pictures called {stem!r}: one of them has to go")
        numbers[stem] = i
    stems = [os.path.splitext(images.key(i))[0] for i in range(len(images))]
    missing = [stem for stem in stems if stem not in numbers]
    if missing:
        raise ValueError(
            f"data.modalities.{name} has no picture for {len(missing)} of {len(stems)} images, e.g. {missing[0]!r}; "
            f"its own are called like {next(iter(numbers))!r}: names in both have to be equal up to the ending"
        )
    return [numbers[stem] for stem in stems]


def as_map(pixels: np.ndarray, settings: ModalitySettings) -> Tensor:
    """Stored numbers [H, W] or [H, W, c] -> a continuous map or a label map.

    Raises:
        ValueError: wrong number of channels, ids out of range, or values that are not finite.
    """
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and pixels.shape[0] != settings.channels:
        pixels = pixels.transpose(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] != settings.channels or pixels.size == 0:
        raise ValueError(f"is {list(pixels.shape)}, a map of {settings.channels} channel(s) was expected")
    if settings.classes is not None:
        return _as_labels(pixels, settings.classes, settings.unlabelled)
    values = pixels.astype(np.float32)
    if np.issubdtype(pixels.dtype, np.integer):
        values /= 65535 if pixels.dtype == np.int32 else np.iinfo(pixels.dtype).max  # PIL opens some 16 bits as 32
    if not np.isfinite(values).all():
        raise ValueError("has values that are NaN or infinite")
    return torch.from_numpy(np.ascontiguousarray(values))


def fit(map: Tensor, size: tuple[int, int]) -> Tensor:
    """A map at the image's size, so that one box cuts both; ValueError when their aspects differ."""
    height, width = map.shape[1:]
    if (height, width) == size:
        return map
    if abs(height / width * size[1] / size[0] - 1) > 0.02:  # small maps are rounded
        raise ValueError(f"is {height} x {width} pixels, the image {size[0]} x {size[1]}: not one shape")
    return _resize(map, size)


def cut_map(map: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut `box` out of a map, resize, flip and turn it, as `cut` does with the image."""
    if map.is_floating_point():
        return cut(map, box, size, "bilinear")
    crop = map[:, box.top : box.top + box.height, box.left : box.left + box.width]
    return cut(_resize(crop, size), box._replace(top=0, left=0, height=size[0], width=size[1]), size, "")


def derived(settings: ModalitySettings, crop: Tensor) -> Tensor:
    """uint8 [C, h, w] -> a map of the same size, from the image itself."""
    pixels = crop.to(torch.float32) / 255
    gray = torch.einsum("c,chw->hw", _LUMA, pixels) if len(pixels) == 3 else pixels.mean(dim=0)
    if settings.derive == "levels":
        assert settings.classes is not None
        return (gray * settings.classes).to(torch.int16).clamp(max=settings.classes - 1)[None]
    if settings.derive == "gray":
        return gray[None]
    around = F.pad(gray[None, None], (1, 1, 1, 1), mode="replicate")
    across = F.conv2d(around, torch.stack([_SOBEL, _SOBEL.T]).unsqueeze(1))  # [1, 2, h, w]
    return across[0].square().sum(dim=0, keepdim=True).sqrt()


def _as_labels(ids: np.ndarray, classes: int, unlabelled: int | None) -> Tensor:
    if not np.issubdtype(ids.dtype, np.integer) and ids.dtype != np.bool_:
        raise ValueError(f"is {ids.dtype}, a label map holds integers")
    ids = ids.astype(np.int64)
    if unlabelled is not None:
        ids = np.where(ids == unlabelled, classes, ids)
    wrong = (ids < 0) | (ids >= classes + (unlabelled is not None))
    if wrong.any():
        raise ValueError(
            f"has id {int(ids[wrong][0])}, but its {classes} classes are 0 .. {classes - 1}: change `classes`, or say "
            "which id is `unlabelled`"
        )
    return torch.from_numpy(ids.astype(np.int16))


def _resize(map: Tensor, size: tuple[int, int]) -> Tensor:
    """Continuous: bilinear with antialiasing; labels: the pixel whose centre is nearest."""
    if map.is_floating_point():
        return F.interpolate(map[None], size=size, mode="bilinear", antialias=True)[0]
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long() for new, old in zip(size, map.shape[1:], strict=True)
    )
    return map[:, rows][:, :, columns]
