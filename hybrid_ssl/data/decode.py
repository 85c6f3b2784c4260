"""Encoded bytes, a path, a PIL image or an array -> uint8 [C, H, W] with the number of channels that was asked for.

JPEG is decoded by torchvision (1.6 times PIL's speed here, and channels-last, which the resize likes); everything
else by PIL, except what PIL reads wrongly without an error: 16-bit PNG (clipped to white, or cut to 8 bits), and TIFF
that is not plain 8-bit (a 13-channel file opens as a picture of 13 columns). What is done to pixels: EXIF orientation
is applied; alpha is laid over mid gray; palettes and CMYK become RGB; the first frame of an animation is taken; gray
is repeated to 3 channels; integers are scaled by the range of their type, or everything by `value_range`. What cannot
be meant is refused: float images without a range, other channel counts, truncated files (never gray-filled), pictures
beyond the pixel limit.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

from .settings import DataSettings

_MID_GRAY = 128
_PNG_16_BIT = (b"\x89PNG\r\n\x1a\n", 24, 16)  # signature, offset of the bit depth in the header, its value
_NPY = b"\x93NUMPY"
_DECODER_ERRORS = (OSError, RuntimeError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error)


@dataclass(frozen=True)
class Decoder:
    """How images are read: channels, value range, pixel limit. Calling it raises `ValueError` with the reason."""

    channels: int = 3
    value_range: tuple[float, float] | None = None
    max_megapixels: float = 64.0

    @classmethod
    def of(cls, cfg: DataSettings) -> Decoder:
        span = cfg.value_range
        return cls(cfg.channels, (span[0], span[1]) if span else None, cfg.max_megapixels)

    def __call__(self, payload: Any) -> Tensor:
        """bytes | path | PIL image | numpy array | tensor -> uint8 [C, H, W]."""
        if isinstance(payload, (str, os.PathLike)):
            payload = _read(payload)
        if isinstance(payload, (bytes, bytearray, memoryview)):
            return self._decode(bytes(payload))
        if isinstance(payload, Image.Image):
            return self._from_pil(payload)
        return self._from_array(np.asarray(payload))

    def stored(self, payload: Any) -> np.ndarray:
        """The numbers as they are stored, for other modalities than images: [H, W] or [H, W, C].

        Palette indices, 16 bits and floats stay what they are; nothing is scaled, converted or laid over gray.
        """
        if isinstance(payload, (str, os.PathLike)):
            payload = _read(payload)
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            return np.asarray(payload)
        data = bytes(payload)
        if data.startswith(_NPY):
            return _read_npy(data)
        with _open(data) as image:
            self._check_size(*image.size)
            try:
                if image.format == "TIFF" and not _is_plain_tiff(image):
                    return _read_tiff(data, self._check_size)
                return np.asarray(ImageOps.exif_transpose(image))
            except _DECODER_ERRORS as problem:
                raise ValueError(f"cannot be decoded: {_sentence(problem)}") from problem

    def _decode(self, data: bytes) -> Tensor:
        if not data:
            raise ValueError("the file is empty")
        if data.startswith(_NPY):
            return self._from_array(_read_npy(data))
        with _open(data) as image:
            self._check_size(*image.size)
            try:
                if image.format == "JPEG" and image.mode in ("L", "RGB") and self.value_range is None:
                    return self._decode_jpeg(data, image.mode)
                if data.startswith(_PNG_16_BIT[0]) and data[_PNG_16_BIT[1]] == _PNG_16_BIT[2]:
                    return self._decode_deep_png(data)
                if image.format == "TIFF" and not _is_plain_tiff(image):
                    return self._from_array(_read_tiff(data, self._check_size))
                return self._from_pil(image)
            except _DECODER_ERRORS as problem:
                raise ValueError(f"cannot be decoded: {_sentence(problem)}") from problem

    def _decode_jpeg(self, data: bytes, mode: str) -> Tensor:
        if mode == "RGB" and self.channels != 3:
            raise ValueError(self._mismatch(3))
        if mode == "L" and self.channels not in (1, 3):
            raise ValueError(self._mismatch(1))
        wanted = ImageReadMode.RGB if self.channels == 3 else ImageReadMode.GRAY
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the buffer is not writable; nothing writes to it
            encoded = torch.frombuffer(data, dtype=torch.uint8)
        return decode_jpeg(encoded, wanted, apply_exif_orientation=True)

    def _decode_deep_png(self, data: bytes) -> Tensor:
        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        array = pixels.numpy().astype(np.float32)  # uint16 [C, H, W]
        if array.shape[0] in (2, 4) and array.shape[0] != self.channels:  # alpha comes last
            alpha = array[-1:] / 65535
            array = array[:-1] * alpha + _MID_GRAY * 257 * (1 - alpha)
        return self._fit(torch.from_numpy(_scale(array, self.value_range or (0, 65535))))

    def _from_pil(self, image: Image.Image) -> Tensor:
        self._check_size(*image.size)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            return self._from_array(np.asarray(image))
        array = np.asarray(_to_bands(image, self.channels))
        return self._from_array(array)

    def _from_array(self, array: np.ndarray) -> Tensor:
        """[H, W], [H, W, C] or [C, H, W]; the axis that has `channels` entries is the channel axis."""
        if array.dtype == object or array.ndim not in (2, 3) or 0 in array.shape:
            raise ValueError(f"an image is [H, W], [H, W, C] or [C, H, W], this is {array.dtype} {list(array.shape)}")
        if array.ndim == 2:
            array = array[None]
        elif array.shape[2] == self.channels or (array.shape[0] != self.channels and array.shape[2] <= 4):
            array = array.transpose(2, 0, 1)
        self._check_size(array.shape[2], array.shape[1])
        if array.dtype != np.uint8 or self.value_range is not None:
            array = _scale(array, self.value_range or _full_range(array.dtype))
        return self._fit(torch.from_numpy(np.array(array)))  # a copy: PIL's buffer is read-only

    def _fit(self, image: Tensor) -> Tensor:
        if image.shape[0] == self.channels:
            return image
        if image.shape[0] == 1 and self.channels == 3:
            return image.expand(3, -1, -1)
        raise ValueError(self._mismatch(image.shape[0]))

    def _mismatch(self, found: int) -> str:
        return f"has {found} channel(s), data.channels asks for {self.channels} (only gray is repeated, to 3)"

    def _check_size(self, width: int, height: int) -> None:
        megapixels = width * height / 1e6
        if megapixels > self.max_megapixels:
            raise ValueError(
                f"has {megapixels:.0f} megapixels ({width}x{height}), data.max_megapixels is {self.max_megapixels:g}"
            )


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as problem:
        raise ValueError(f"cannot be read: {_sentence(problem)}") from problem


def _sentence(problem: BaseException) -> str:
    text = str(problem.strerror if isinstance(problem, OSError) and problem.strerror else problem)
    return text.splitlines()[0][:200] if text else type(problem).__name__


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open with PIL, whose own pixel limit is lifted meanwhile: ours is checked from the header."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about odd metadata, one for each image and epoch
            try:
                image = Image.open(io.BytesIO(data))
            except UnidentifiedImageError:
                raise ValueError("is no image that can be read (unknown format, or cut off in the header)") from None
            except Exception as problem:  # parsers of 40 formats
                raise ValueError(f"cannot be decoded: {_sentence(problem)}") from problem
            with image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _to_bands(image: Image.Image, channels: int) -> Image.Image:
    """Any 8-bit mode -> L or RGB (RGBA is kept where 4 channels are asked for)."""
    if image.mode == "RGBA" and channels == 4:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        over = Image.new("RGBA", image.size, (_MID_GRAY, _MID_GRAY, _MID_GRAY, 255))
        flat = Image.alpha_composite(over, image.convert("RGBA"))
        return flat.convert("L") if image.mode in ("LA", "La", "L") else flat.convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _is_plain_tiff(image: Image.Image) -> bool:
    """One page of 8-bit gray, RGB, palette or CMYK, which PIL reads rightly."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, (1,))
    bits = bits if isinstance(bits, tuple) else (bits,)
    return getattr(image, "n_frames", 1) == 1 and max(bits) <= 8 and tags.get(277, 1) <= 4


def _read_tiff(data: bytes, check_size: Any) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise ValueError("needs `pip install tifffile imagecodecs`: a TIFF of more than 8 bits or pages") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            shape = file.series[0].shape
            sides = sorted(shape)[-2:]
            check_size(*sides)
            array = np.asarray(file.series[0].asarray())
    except ValueError:
        raise
    except Exception as problem:  # a parser of hundreds of vendors' dialects
        raise ValueError(f"cannot be decoded: {_sentence(problem)}") from problem
    return array.squeeze() if array.ndim > 3 else array


def _read_npy(data: bytes) -> np.ndarray:
    try:
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))  # a pickle in it would run code
    except (ValueError, EOFError, OSError) as problem:
        raise ValueError(f"cannot be decoded: {_sentence(problem)}") from problem


def _full_range(dtype: np.dtype) -> tuple[float, float]:
    if dtype == np.bool_:
        return 0, 1
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return info.min, info.max
    raise ValueError(f"has {dtype} values: say which range means black to white with data.value_range=[low,high]")


def _scale(array: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Map `span` to 0..255, clip and round."""
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ValueError("has pixels that are NaN or infinite")
    low, high = span
    scaled = (array.astype(np.float64) - low) * (255.0 / (high - low))
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)
