"""Flips and large-scale jitter: image, boxes and masks stay together, everything comes from the generator."""

from __future__ import annotations

from random import Random

import pytest
import torch

from hybrid_ssl.downstream.detection.augment import Objects, augment, fitted, tidy, tight_boxes
from hybrid_ssl.downstream.detection.settings import DetectionAugment

JITTER = DetectionAugment(hflip=0.5, scale=[0.3, 2.0])


def picture(height: int = 60, width: int = 90) -> tuple[torch.Tensor, Objects]:
    """Two objects that do not touch: their brightness is 100 and 200, their masks are exact."""
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 5:25, 10:40] = 1
    masks[1, 30:55, 50:85] = 1
    image = (100 * masks[0] + 200 * masks[1])[None]
    return image, Objects(tight_boxes(masks), torch.tensor([0, 1]), masks)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_tight_around_masks_and_masks_lie_on_their_objects(seed: int) -> None:
    image, objects = picture()
    out, found = augment(image, objects, JITTER, 64, Random(seed))
    assert found.masks is not None and found.masks.shape[1:] == out.shape[1:] and max(out.shape[1:]) <= 64
    for box, label, mask in zip(found.boxes, found.labels, found.masks, strict=True):
        left, top, right, bottom = (int(side) for side in box)
        assert mask[top:bottom, left:right].any(0).all() and mask[top:bottom, left:right].any(1).all()
        assert mask.sum() == mask[top:bottom, left:right].sum()
        inside = out[0][mask.bool()].float()
        assert (inside - (100, 200)[int(label)]).abs().median() < 10


@pytest.mark.parametrize("seed", range(12))
def test_boxes_without_masks_go_where_masks_would_put_them(seed: int) -> None:
    image, objects = picture()
    _, exact = augment(image, objects, JITTER, 64, Random(seed))
    _, alone = augment(image, objects._replace(masks=None), JITTER, 64, Random(seed))
    kept = [row for row, label in enumerate(alone.labels.tolist()) if label in exact.labels.tolist()]
    assert len(kept) == len(exact.labels)
    assert (alone.boxes[kept] - exact.boxes).abs().max() <= 1.01 if kept else True  # a nearest pixel, by rounding


def test_the_generator_decides_everything() -> None:
    first, again = (augment(*picture(), JITTER, 64, Random(5)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1].boxes, again[1].boxes)
    assert any(augment(*picture(), JITTER, 64, Random(seed))[0].shape != first[0].shape for seed in range(4))


def test_a_flip_is_exact() -> None:
    image, objects = picture()
    flipped, found = augment(image, objects, DetectionAugment(hflip=1.0, scale=[1.0, 1.0]), 90, Random(0))
    assert torch.equal(flipped, image.flip(-1))
    assert found.boxes.tolist() == [[50, 5, 80, 25], [5, 30, 40, 55]]


def test_scale_has_the_size_it_says() -> None:
    image, objects = picture(60, 90)
    sizes = {
        scale: augment(image, objects, DetectionAugment(scale=[scale, scale]), 90, Random(1))[0].shape[1:]
        for scale in (0.5, 1.0, 2.0)
    }
    assert sizes == {0.5: (30, 45), 1.0: (60, 90), 2.0: (90, 90)}


def test_what_is_not_seen_is_dropped() -> None:
    boxes = torch.tensor([[-5.0, 2, 4, 8], [10.2, 1, 30, 5], [4, 9.5, 8, 20]])
    found = tidy(Objects(boxes, torch.tensor([0, 1, 2])), (10, 10))
    assert found.labels.tolist() == [0] and found.boxes.tolist() == [[0, 2, 4, 8]]
    masks = torch.zeros(2, 10, 10, dtype=torch.uint8)
    masks[1, 2:4, 5:9] = 1
    found = tidy(Objects(boxes[:2], torch.tensor([3, 4]), masks), (10, 10))
    assert found.labels.tolist() == [4] and found.boxes.tolist() == [[5, 2, 9, 4]]


def test_images_without_objects_stay_empty() -> None:
    image, objects = picture()
    nothing = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 60, 90, dtype=torch.uint8))
    out, found = augment(image, nothing, JITTER, 64, Random(3))
    assert found.boxes.shape == (0, 4) and found.masks is not None and found.masks.shape == (0, *out.shape[1:])


@pytest.mark.parametrize(("size", "expected"), [((480, 640), (24, 32)), ((10, 10), (32, 32)), ((1, 1000), (1, 32))])
def test_whole_images_fit_into_the_square(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(*size, 32) == expected
