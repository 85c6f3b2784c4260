import math

import pytest
import torch

from hybrid_ssl.nn.lab import ab_bins, soft_bins, srgb_to_lab

KNOWN = {  # published for D65 and 2 degrees; without linearisation red would have a = 50
    (255, 0, 0): (53.24, 80.09, 67.20),
    (0, 255, 0): (87.73, -86.18, 83.18),
    (0, 0, 255): (32.30, 79.19, -107.86),
    (255, 255, 0): (97.14, -21.55, 94.48),
    (255, 255, 255): (100.0, 0.0, 0.0),
    (119, 119, 119): (50.03, 0.0, 0.0),
    (0, 0, 0): (0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("rgb", KNOWN)
def test_known_colours(rgb: tuple[int, int, int]) -> None:
    lab = srgb_to_lab(torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1) / 255).flatten()
    torch.testing.assert_close(lab, torch.tensor(KNOWN[rgb], dtype=torch.float64), atol=0.01, rtol=0)


def test_dark_colours_take_the_linear_parts_of_both_curves() -> None:
    value = 5 / 255  # below 0.04045
    linear = value / 12.92
    y = 0.2126729 * linear
    assert y < (6 / 29) ** 3
    lab = srgb_to_lab(torch.tensor([value, 0, 0]).view(3, 1, 1)).flatten()
    assert lab[0].item() == pytest.approx(116 * (y / (3 * (6 / 29) ** 2) + 4 / 29) - 16, rel=1e-4)


def test_any_leading_shape_and_half_precision_in() -> None:
    images = torch.rand(2, 4, 3, 5, 6)
    torch.testing.assert_close(srgb_to_lab(images)[1, 2], srgb_to_lab(images[1, 2]), atol=1e-3, rtol=0)
    assert srgb_to_lab(images.bfloat16()).dtype == torch.float32


def test_bins_are_grid_nodes_around_what_can_be_shown() -> None:
    bins = ab_bins()
    assert bins.shape == (313, 2) and len({tuple(b) for b in bins.tolist()}) == 313
    assert torch.equal(bins, (bins / 10).round() * 10)
    colours = srgb_to_lab(torch.rand(3, 100, 100, generator=torch.Generator().manual_seed(0)))[1:].flatten(1).T
    off = (colours[:, None] - bins).abs().amax(2).amin(1)
    assert off.max() <= 5  # every colour lies in a bin
    used = torch.cdist(colours, bins).argmin(1).unique()
    assert 180 < len(used) <= 262


def test_soft_bins_are_the_five_nearest_with_gaussian_shares() -> None:
    bins = ab_bins()
    colours = torch.tensor([[3.0, -12.0], [80.0, 67.0], [79.0, -107.0]])
    near, shares = soft_bins(colours, bins)
    for row, colour in enumerate(colours):
        distances = {i: math.dist(colour.tolist(), b) for i, b in enumerate(bins.tolist())}
        nearest = sorted(distances, key=distances.__getitem__)[:5]
        assert near[row, 0] == nearest[0]
        weights = [math.exp(-(distances[i] ** 2) / 50) for i in nearest]
        expected = torch.tensor([w / sum(weights) for w in weights])
        torch.testing.assert_close(shares[row], expected, atol=1e-5, rtol=1e-4)
