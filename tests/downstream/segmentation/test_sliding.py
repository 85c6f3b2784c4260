"""Sliding windows: cover all, average where they overlap, and are the whole image when one window is enough."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_ssl.downstream.segmentation.settings import SegmentationTest
from hybrid_ssl.downstream.segmentation.sliding import slide, starts, windows
from hybrid_ssl.downstream.segmentation.task import sliding_of


def scores(images: Tensor) -> Tensor:
    """Depend on the whole window, as a network's do."""
    return torch.stack([images[:, 0] + images.mean(dim=(1, 2, 3), keepdim=True)[:, 0], images[:, 1]], dim=1)


@pytest.mark.parametrize("length", [5, 8, 9, 20, 21])
@pytest.mark.parametrize("stride", [3, 8])
def test_windows_cover_every_pixel_and_stay_inside(length: int, stride: int) -> None:
    seen = torch.zeros(length, 10)
    for rows, columns in windows((length, 10), (8, 8), (stride, stride)):
        assert rows.stop - rows.start == 8 and columns.stop <= 10
        assert rows.stop <= max(8, length)
        seen[rows, columns] += 1
    assert (seen > 0).all()


def test_the_last_window_ends_at_the_border() -> None:
    assert starts(512, 512, 341) == [0] and starts(683, 512, 341) == [0, 171] and starts(20, 8, 8) == [0, 8, 12]


def test_overlaps_are_averaged() -> None:
    images = torch.randn(2, 2, 11, 13)
    total, count = torch.zeros(2, 2, 11, 13), torch.zeros(11, 13)
    for top in (0, 4, 5):
        for left in (0, 4, 7):
            total[:, :, top : top + 6, left : left + 6] += scores(images[:, :, top : top + 6, left : left + 6])
            count[top : top + 6, left : left + 6] += 1
    assert torch.allclose(slide(scores, images, (6, 6), (4, 4)), total / count)


def test_one_window_over_all_is_the_whole_image_to_the_bit() -> None:
    images = torch.randn(2, 2, 9, 7)
    for window in ((9, 7), (20, 20)):
        assert torch.equal(slide(scores, images, window, (5, 5)), scores(images))


def test_strides_that_leave_pixels_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lower test\.stride|lower it"):
        sliding_of(SegmentationTest(mode="slide", crop=16, stride=17), (16, 16))
    with pytest.raises(ValueError, match="leave pixels out"):
        slide(scores, torch.zeros(1, 2, 40, 40), (8, 8), (9, 8))


def test_defaults_are_the_papers() -> None:
    assert sliding_of(SegmentationTest(mode="slide"), (512, 512)) == ((512, 512), (341, 341))
    assert sliding_of(SegmentationTest(), (512, 512)) == (None, None)
