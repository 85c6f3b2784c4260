"""The histograms are those of an independent loop, and the cases in which implementations differ."""

import math

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.hog import hog, hog_patches, sobel, window


def picture(height: int = 32, width: int = 32, channels: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, height, width, generator=draw, dtype=torch.float64)


def slowly(image: Tensor, cell: int, bins: int) -> Tensor:
    """One channel [H, W], pixel by pixel: [bins, H / cell, W / cell]."""
    h, w = image.shape
    kernel = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]
    side = 2 * cell
    bell = [math.exp(-0.5 * ((i - (side - 1) / 2) / cell) ** 2) for i in range(side)]
    out = torch.zeros(bins, h // cell, w // cell, dtype=torch.float64)

    def at(y: int, x: int) -> float:
        y, x = abs(y), abs(x)  # reflected: the border pixel is not repeated
        return image[y if y < h else 2 * h - 2 - y, x if x < w else 2 * w - 2 - x].item()

    for y in range(h):
        for x in range(w):
            around = [(i, j, at(y + i - 1, x + j - 1)) for i in range(3) for j in range(3)]
            gx = sum(kernel[i][j] * value for i, j, value in around)
            gy = sum(kernel[j][i] * value for i, j, value in around)
            weight = bell[y % side] * bell[x % side] / sum(bell) ** 2
            which = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
            out[which, y // cell, x // cell] += weight * math.sqrt(gx**2 + gy**2)
    return out / out.norm(dim=0, keepdim=True).clamp(min=1e-12)


@pytest.mark.parametrize(("cell", "bins", "size"), [(8, 9, (16, 32)), (4, 5, (12, 8))])
def test_histograms_equal_a_loop_over_pixels(cell: int, bins: int, size: tuple[int, int]) -> None:
    images = picture(*size, channels=2)
    expected = torch.stack([torch.stack([slowly(c, cell, bins) for c in image]) for image in images])
    torch.testing.assert_close(hog(images, cell, bins), expected)


def edges(angle: float) -> Tensor:
    """A wave whose lines of equal brightness run at `angle` degrees from upright."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    turn = math.radians(angle)
    return torch.sin((x * math.cos(turn) + y * math.sin(turn)) / 3).double()[None, None]


@pytest.mark.parametrize(("angle", "expected"), [(0, 4), (90, 0), (35, 2), (-35, 6)])
def test_an_orientation_is_counted_from_the_y_axis(angle: float, expected: int) -> None:
    # atan2(down, across), the other argument order in use, would put the upright edge into bin 0
    energy = hog(edges(angle))[0, 0, :, 1:-1, 1:-1].sum((1, 2))
    near_border = 0.5 if angle == 90 else 0.8  # at a multiple of 20 degrees rounding decides between two bins
    assert energy.argmax() == expected or angle == 90 and energy.argmax() in (0, 8)
    assert energy.max() > near_border * energy.sum()


def test_opposite_gradients_and_half_turns_are_the_same_orientation() -> None:
    images = picture()
    torch.testing.assert_close(hog(-images), hog(images))
    torch.testing.assert_close(hog(images.rot90(2, (2, 3))), hog(images).rot90(2, (3, 4)))


def test_each_cell_has_length_one_and_a_flat_one_zero() -> None:
    images = picture()
    images[:, 0] = 0.7
    length = hog(images).norm(dim=2)
    assert torch.equal(length[:, 0], torch.zeros_like(length[:, 0]))
    torch.testing.assert_close(length[:, 1:], torch.ones_like(length[:, 1:]))


def test_patches_hold_channel_then_bin_then_cells() -> None:
    images = picture(32, 48)
    whole, patches = hog(images), hog_patches(images, 16)
    assert patches.shape == (2, 2 * 3, 108)
    for row, column, channel, b, y, x in [(0, 0, 0, 0, 0, 0), (1, 2, 2, 8, 1, 0), (0, 1, 1, 4, 0, 1)]:
        value = patches[1, row * 3 + column, ((channel * 9 + b) * 2 + y) * 2 + x]
        assert value == whole[1, channel, b, row * 2 + y, column * 2 + x]


def test_the_window_is_that_of_16_pixels_around_each_patch() -> None:
    tile = window(16, torch.zeros(32, 48, dtype=torch.float64))
    torch.testing.assert_close(tile[:16, :16].sum(), torch.tensor(1.0).double())
    assert torch.equal(tile[16:, 32:], tile[:16, :16])
    torch.testing.assert_close(tile[7, 7] / tile[7, 0], torch.tensor(math.exp(-0.5 * (0.25 - 56.25) / 64)).double())


def test_gradients_reflect_the_border() -> None:
    across, _ = sobel(torch.arange(6.0).expand(1, 1, 6, 6))
    assert across[0, 0, 2].tolist() == [0, -8, -8, -8, -8, 0]


def test_half_precision_images_are_computed_in_full() -> None:
    images = picture().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = hog(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hog(images.float()))


def test_cells_that_do_not_divide_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="patch of 4 pixels has no whole number of 8-pixel cells; cell: 4 fits"):
        hog_patches(picture(), 4)
