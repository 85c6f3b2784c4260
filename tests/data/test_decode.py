"""Decoded pixels are the stored ones, for every kind of file that is read wrongly elsewhere; the rest is refused."""

from __future__ import annotations

import builtins
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hybrid_ssl.data.decode import Decoder

RAMP = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
RGB = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.float() - b.float()).abs().mean().item() <= tolerance


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a sample, written by hand: PIL cannot write RGB ones."""
    height, width = values.shape[:2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_png_and_jpeg_come_out_as_stored() -> None:
    image = Image.fromarray(RGB)
    assert torch.equal(Decoder()(encode(image, "PNG")), chw(RGB))
    assert close(Decoder()(encode(image, "JPEG", quality=95)), chw(RGB), 3.0)
    assert torch.equal(Decoder()(image), chw(RGB)) and torch.equal(Decoder()(RGB), chw(RGB))


def test_paths_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(RGB), "PNG"))
    assert torch.equal(Decoder()(tmp_path / "a.png"), chw(RGB)) and torch.equal(
        Decoder()(str(tmp_path / "a.png")), chw(RGB)
    )
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Decoder()(tmp_path / "b.png")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Decoder()(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_gray_is_repeated_only_where_three_channels_are_asked_for(kind: str) -> None:
    data = encode(Image.fromarray(RAMP), kind)
    gray = Decoder(channels=1)(data)
    assert gray.shape == (1, 48, 64) and close(gray[0], torch.from_numpy(RAMP), 1.0)
    assert torch.equal(Decoder()(data), gray.expand(3, -1, -1))
    with pytest.raises(ValueError, match=r"1 channel\(s\), data.channels asks for 2"):
        Decoder(channels=2)(data)
    with pytest.raises(ValueError, match=r"3 channel\(s\), data.channels asks for 1"):
        Decoder(channels=1)(encode(Image.fromarray(RGB), kind))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = Decoder()(encode(Image.fromarray(RGB), kind, exif=exif))
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: np.rot90(RGB, 2).transpose(1, 0, 2),
        8: np.rot90(RGB),
    }[orientation]
    assert close(out, chw(turned), 4.0)


def test_cmyk_jpeg_becomes_rgb() -> None:
    out = Decoder()(encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95))
    assert close(out, chw(RGB), 4.0)


def test_alpha_is_laid_over_mid_gray() -> None:
    alpha = np.zeros((48, 64, 1), np.uint8)
    alpha[:, 32:] = 255
    out = Decoder()(encode(Image.fromarray(np.concatenate([RGB, alpha], -1)), "PNG"))
    assert (out[:, :, :32] == 128).all() and torch.equal(out[:, :, 32:], chw(RGB)[:, :, 32:])
    gray = Decoder(channels=1)(encode(Image.fromarray(np.concatenate([RAMP[..., None], alpha], -1), "LA"), "PNG"))
    assert (gray[:, :, :32] == 128).all() and torch.equal(gray[0, :, 32:], torch.from_numpy(RAMP)[:, 32:])
    four = Decoder(channels=4)(encode(Image.fromarray(np.concatenate([RGB, alpha], -1)), "PNG"))
    assert torch.equal(four[3], torch.from_numpy(alpha[..., 0]))


def test_palette_and_one_bit_images() -> None:
    palette = Image.fromarray(RGB).quantize(256)
    assert torch.equal(Decoder()(encode(palette, "PNG")), chw(np.asarray(palette.convert("RGB"))))
    assert torch.equal(Decoder()(encode(palette, "GIF")), chw(np.asarray(palette.convert("RGB"))))
    bits = Decoder(channels=1)(encode(Image.fromarray(RAMP > 100), "PNG"))
    assert torch.equal(bits[0], torch.from_numpy((RAMP > 100).astype(np.uint8) * 255))


def test_sixteen_bit_png_is_scaled_and_not_clipped() -> None:
    deep = RAMP.astype(np.uint16) * 257
    assert torch.equal(Decoder(channels=1)(deep_png(deep))[0], torch.from_numpy(RAMP))
    assert torch.equal(Decoder()(deep_png(RGB.astype(np.uint16) * 257)), chw(RGB))
    with_alpha = np.concatenate([RGB.astype(np.uint16) * 257, np.full((48, 64, 1), 65535, np.uint16)], -1)
    assert torch.equal(Decoder()(deep_png(with_alpha)), chw(RGB))


def test_value_range_stretches_twelve_bits() -> None:
    twelve = RAMP.astype(np.uint16) * 16
    assert close(Decoder(channels=1, value_range=(0, 4080))(deep_png(twelve))[0], torch.from_numpy(RAMP), 0.0)
    stretched = Decoder(channels=1, value_range=(0, 100))(encode(Image.fromarray(RAMP), "PNG"))
    assert torch.equal(stretched[0], torch.from_numpy((RAMP.clip(0, 100) * 2.55 + 0.5).astype(np.uint8)))
    assert Decoder(channels=1, value_range=(0, 100))(encode(Image.fromarray(RAMP), "JPEG")).max() == 255


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_arrays_of_many_channels_in_either_layout() -> None:
    many = np.random.default_rng(0).integers(0, 65535, (20, 30, 13), dtype=np.uint16)
    expected = torch.from_numpy((many / 257).round().astype(np.uint8)).permute(2, 0, 1)
    for layout in (many, many.transpose(2, 0, 1)):
        assert close(Decoder(channels=13)(npy(layout)), expected, 0.01)
    with pytest.raises(ValueError, match="13 channel"):
        Decoder()(npy(many.transpose(2, 0, 1)))
    with pytest.raises(ValueError, match="an image is"):
        Decoder()(npy(np.zeros((2, 3, 4, 5), np.uint8)))


def test_float_images_need_a_range() -> None:
    values = RAMP.astype(np.float32) / 255
    with pytest.raises(ValueError, match="float32 values: .*value_range"):
        Decoder(channels=1)(npy(values))
    assert torch.equal(Decoder(channels=1, value_range=(0, 1))(npy(values))[0], torch.from_numpy(RAMP))
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        Decoder(channels=1, value_range=(0, 1))(npy(values))


def test_signed_integers_use_their_full_range() -> None:
    out = Decoder(channels=1)(np.array([[-32768, 0, 32767]], np.int16))
    assert out.tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("planar", [False, True])
def test_tiff_of_many_channels_is_read_whole(planar: bool) -> None:
    tifffile = pytest.importorskip("tifffile")
    many = np.random.default_rng(0).integers(0, 65535, (20, 30, 13), dtype=np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, many.transpose(2, 0, 1) if planar else many)
    out = Decoder(channels=13)(buffer.getvalue())
    assert close(out, torch.from_numpy((many / 257).round().astype(np.uint8)).permute(2, 0, 1), 0.01)


def test_float_tiff_is_neither_black_nor_guessed() -> None:
    pytest.importorskip("tifffile")
    data = encode(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF")
    with pytest.raises(ValueError, match="value_range"):
        Decoder(channels=1)(data)
    assert torch.equal(Decoder(channels=1, value_range=(0, 1))(data)[0], torch.from_numpy(RAMP))


def test_plain_tiff_needs_no_extra_and_others_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_tifffile(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tifffile)
    assert torch.equal(Decoder()(encode(Image.fromarray(RGB), "TIFF")), chw(RGB))
    with pytest.raises(ValueError, match="pip install tifffile"):
        Decoder()(encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"))


def broken_files() -> dict[str, bytes]:
    jpeg = encode(Image.fromarray(RGB), "JPEG", quality=95)
    png = encode(Image.fromarray(RGB), "PNG")
    return {
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "JPEG without its end": jpeg[:-300],
        "20 bytes of a JPEG": jpeg[:20],
        "half a PNG": png[: len(png) // 2],
        "nothing": b"",
        "text": b"this is text",
        "drawing": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "garbage": bytes(range(256)) * 20,
        "half a 16-bit PNG": deep_png(RAMP.astype(np.uint16))[:200],
        "half a TIFF": encode(Image.fromarray(RGB), "TIFF")[:3000],
        "half a GIF": encode(Image.fromarray(RGB).quantize(64), "GIF")[:900],
        "half an array": npy(RGB)[:1000],
        "a pickle": npy(np.array([{"a": 1}], dtype=object)),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be decoded|no image|empty"):
        Decoder()(broken_files()[name])


def test_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encode(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="400 megapixels"):
        Decoder()(bomb)
    small = encode(Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL's own limit would refuse this picture
    assert torch.equal(Decoder()(small), chw(RGB)) and Image.MAX_IMAGE_PIXELS == 100


def test_tiny_and_extreme_shapes_are_read() -> None:
    assert Decoder()(encode(Image.new("RGB", (1, 1)), "PNG")).shape == (3, 1, 1)
    assert Decoder()(encode(Image.new("RGB", (2000, 2)), "JPEG")).shape == (3, 2, 2000)
