"""Photo-like JPEGs without photos: noise with the spectrum of natural images, saved at about 100 kB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375  # ImageNet's most frequent size, of about 100 kB
BYTES = 103_000


def make_photos(count: int) -> list[bytes]:
    """`count` JPEG files; the same ones at every call."""
    rng = np.random.default_rng(0)
    return [_encode(_picture(rng)) for _ in range(count)]


def _picture(rng: np.random.Generator) -> Image.Image:
    """Amplitudes fall as 1 / frequency (Field 1987); luminance is common to the channels, colour is fainter."""
    y, x = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    amplitude = 1 / np.maximum(np.hypot(x, y), 1 / WIDTH)
    planes = []
    for _ in range(4):
        phases = np.exp(2j * np.pi * rng.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phases, s=(HEIGHT, WIDTH))
        planes.append(plane / plane.std())
    pixels = 120 + 50 * planes[0][..., None] + 15 * np.stack(planes[1:], axis=-1)  # [H, W, 3]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _encode(picture: Image.Image) -> bytes:
    """The quality that comes nearest to the wanted size from below."""
    best = b""
    for quality in range(40, 100, 3):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        if best and file.tell() > BYTES:
            break
        best = file.getvalue()
    return best
