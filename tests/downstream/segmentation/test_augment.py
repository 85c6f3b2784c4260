"""Crops: image and mask stay together, everything comes from the key, no class fills a crop."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from hybrid_ssl.downstream.segmentation.augment import Augment
from hybrid_ssl.downstream.segmentation.metrics import IGNORED
from hybrid_ssl.downstream.segmentation.settings import SegmentationAugment


def augment(**settings: object) -> Augment:
    plain = {"size": 16, "scale": [1.0, 1.0], "cat_max_ratio": 1.0, "jitter": None, "hflip": 0.0}
    return Augment(SegmentationAugment.model_validate(plain | settings), [128])


def numbered(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Blocks of 8 pixels, each with a brightness of its own that is 10 times its class."""
    rows, columns = torch.arange(height) // 8, torch.arange(width) // 8
    mask = (rows[:, None] * 3 + columns[None, :]) % 25
    return (mask * 10).to(torch.uint8)[None], mask.short()


@pytest.mark.parametrize("settings", [{}, {"hflip": 1.0}, {"vflip": 1.0}, {"hflip": 1.0, "vflip": 1.0}])
def test_mask_follows_the_image(settings: dict[str, float]) -> None:
    image, mask = numbered(48, 40)
    for seed in range(5):
        crop, labels = augment(**settings)(image, mask, Random(seed))
        assert crop.shape == (1, 16, 16) and labels.shape == (16, 16)
        assert torch.equal(crop[0].short(), labels * 10)


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
def test_mask_follows_the_image_when_resized(scale: float) -> None:
    image, mask = numbered(64, 64)
    crop, labels = augment(size=32, scale=[scale, scale])(image, mask, Random(2))
    inside = (crop[0].short() - labels * 10).abs() <= 2
    assert inside.float().mean() > 0.5  # all but the blurred borders of blocks
    assert set(labels.unique().tolist()) <= set(mask.unique().tolist())


def test_what_lies_outside_is_the_mean_colour_and_ignored() -> None:
    image, mask = numbered(16, 24)
    crop, labels = augment(size=32)(image, mask, Random(0))
    assert crop.shape == (1, 32, 32) and torch.equal(crop[:, :16, :24], image)
    assert (crop[:, 16:] == 128).all() and (crop[:, :, 24:] == 128).all()
    assert (labels[16:] == IGNORED).all() and (labels[:, 24:] == IGNORED).all() and (labels[:16, :24] >= 0).all()


def test_short_side_is_resized_first() -> None:
    image, mask = numbered(64, 96)
    crop, labels = augment(size=32, short_side=32)(image, mask, Random(1))
    assert len(labels.unique()) > 20  # a crop of 32 of 64 rows would show 16 blocks


def test_a_crop_is_a_function_of_its_key() -> None:
    image, mask = numbered(64, 64)
    image = image.expand(3, -1, -1)
    full = Augment(SegmentationAugment(size=32), [1, 2, 3])
    one, two, other = (full(image, mask, Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_crops_of_one_class_are_drawn_again() -> None:
    mask = torch.zeros(64, 64, dtype=torch.int16)
    mask[:, 56:] = 1
    image = mask.to(torch.uint8)[None]
    shares = {}
    for ratio in (1.0, 0.75):
        crops = [augment(cat_max_ratio=ratio)(image, mask, Random(seed))[1] for seed in range(60)]
        shares[ratio] = sum(len(labels.unique()) > 1 for labels in crops) / 60
    assert shares[0.75] > 2 * shares[1.0]


def test_ignored_pixels_do_not_count_as_a_class() -> None:
    mask = torch.full((64, 64), IGNORED, dtype=torch.int16)
    mask[:, :20], mask[:, 20:30] = 0, 1
    assert augment(cat_max_ratio=0.75)._is_mixed(mask)
    mask[:, 20:30] = IGNORED
    assert not augment(cat_max_ratio=0.75)._is_mixed(mask)
