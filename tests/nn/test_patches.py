import pytest
import torch

from hybrid_ssl.nn.patches import PatchOrder, gather_rows, patch_statistics, patchify, unpatchify


@pytest.mark.parametrize("order", ["p q c", "c p q"])
def test_every_pixel_lands_where_the_order_says(order: PatchOrder) -> None:
    c, p, rows, columns = 2, 3, 2, 4
    images = torch.arange(c * p * rows * p * columns).reshape(1, c, p * rows, p * columns)
    patches = patchify(images, p, order)
    assert patches.shape == (1, rows * columns, c * p * p)
    for channel in range(c):
        for y in range(p * rows):
            for x in range(p * columns):
                inner = (y % p) * p + x % p
                value = inner * c + channel if order == "p q c" else channel * p * p + inner
                assert patches[0, (y // p) * columns + x // p, value] == images[0, channel, y, x]


@pytest.mark.parametrize("order", ["p q c", "c p q"])
def test_unpatchify_is_the_inverse(order: PatchOrder) -> None:
    images = torch.randn(2, 5, 6, 4)
    assert torch.equal(unpatchify(patchify(images, 2, order), (3, 2), 2, order), images)


def test_statistics_are_joint_over_channels_and_unbiased() -> None:
    patches = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    mean, std = patch_statistics(patches)
    assert mean.item() == 3.0
    assert std.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5)


def test_a_flat_patch_has_finite_statistics_in_half_precision() -> None:
    patches = torch.full((1, 768), 2.1, dtype=torch.bfloat16)
    mean, std = patch_statistics(patches)
    assert mean.dtype == std.dtype == torch.float32
    assert std.item() == pytest.approx(1e-3, rel=1e-2)
    assert ((patches - mean) / std).abs().max() < 1e-2


def test_gather_takes_rows_of_each_image() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert gather_rows(x, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="30 x 32 pixels cannot be cut into patches of 16"):
        patchify(torch.zeros(1, 3, 30, 32), 16, "p q c")
