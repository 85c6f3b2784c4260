"""Pyramids of every encoder: strides, shapes, anchors and pooling where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torchvision.models.detection.image_list import ImageList

from hybrid_ssl.downstream.detection.heads import Anchors, RoiPool
from hybrid_ssl.downstream.detection.pyramid import Pyramid, show, shown_at
from hybrid_ssl.downstream.encoders import dense_maps, taps_of

VIT: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 1, "num_classes": 0}
SWIN: dict[str, Any] = {"embed_dim": 8, "num_heads": [1] * 4, "window_size": 4, "num_classes": 0}


def vit(patch: int, size: int) -> Any:
    return timm.create_model("vit_tiny_patch16_224", patch_size=patch, img_size=size, **VIT)


def swin(patch: int, stages: int, size: int) -> Any:
    args = SWIN | {"depths": [1] * stages, "num_heads": [1] * stages}
    return timm.create_model("swin_tiny_patch4_window7_224", patch_size=patch, img_size=size, **args)


@pytest.mark.parametrize(
    ("encoder", "strides", "expected"),
    [
        (lambda: vit(16, 64), None, (4, 8, 16, 32, 64)),
        (lambda: vit(8, 64), None, (4, 8, 16, 32, 64)),
        (lambda: vit(32, 64), None, (4, 8, 16, 32, 64)),
        (lambda: vit(4, 64), [8, 16], (8, 16, 32)),
        (lambda: vit(16, 64), [2, 4], (2, 4, 8)),
        (lambda: swin(4, 4, 64), None, (4, 8, 16, 32, 64)),
        (lambda: swin(2, 3, 64), None, (2, 4, 8, 16)),
        (lambda: swin(4, 3, 64), [4, 8, 16, 32], (4, 8, 16, 32, 64)),
        (lambda: swin(4, 3, 64), [8, 16], (8, 16, 32)),
    ],
)
def test_levels_have_their_strides(encoder: Any, strides: list[int] | None, expected: tuple[int, ...]) -> None:
    model = encoder()
    taps = taps_of(model)
    pyramid = Pyramid(taps, strides, 8)
    assert pyramid.strides == expected and 64 % pyramid.unit == 0
    levels = pyramid(dense_maps(model, torch.randn(2, 3, 64, 64), taps))
    assert [tuple(level.shape) for level in levels] == [(2, 8, 64 // s, 64 // s) for s in expected]


def test_patches_of_14_pixels_see_a_smaller_picture_so_that_cells_are_16() -> None:
    model = vit(14, 56)
    taps = taps_of(model)
    assert shown_at(taps) == (14 / 16, (16,) * 4)
    pyramid = Pyramid(taps, [8, 16], 8)
    levels = pyramid(dense_maps(model, show(torch.randn(1, 3, 64, 64), pyramid.shown), taps))
    assert [level.shape[-1] for level in levels] == [8, 4, 2]


def test_strides_that_no_stage_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strides \[2, 4\]: the encoder's stages have the strides \[4, 8, 16\]"):
        Pyramid(taps_of(swin(4, 3, 64)), [2, 4], 8)


def test_a_change_in_the_picture_moves_the_cells_it_lies_in() -> None:
    model = vit(8, 64).eval()
    taps = taps_of(model)
    pyramid = Pyramid(taps, [4, 8, 16], 8).eval()
    maps = [torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 8)]
    maps[-1][0, :, 5, 2] = torch.randn(16)  # pixels 40..48 down, 16..24 across
    nothing = [torch.zeros(1, 16, 8, 8)]
    for level, base, stride in list(zip(pyramid(maps), pyramid(nothing), pyramid.strides, strict=True))[:-1]:
        rows, columns = torch.nonzero((level - base).abs().sum(1)[0] > 1e-6, as_tuple=True)
        assert len(rows)
        reach = 4 + 1.5 * stride  # half a token, half a cell and the 3x3 convolution
        assert ((rows + 0.5) * stride - 44).abs().max() <= reach
        assert ((columns + 0.5) * stride - 20).abs().max() <= reach


def test_anchors_lie_in_the_middle_of_their_cells_in_float32() -> None:
    anchors = Anchors([[16.0], [32.0]], [1.0, 0.5], (8, 16))
    levels = [torch.zeros(2, 4, 3, 2, dtype=torch.bfloat16), torch.zeros(2, 4, 2, 1, dtype=torch.bfloat16)]
    first, second = anchors(ImageList(torch.zeros(2, 1, 24, 16), [(24, 16)] * 2), levels)
    assert first.dtype == torch.float32 and torch.equal(first, second) and len(first) == 2 * (6 + 2)
    centres = (first[:, :2] + first[:, 2:]) / 2
    assert centres[0].tolist() == [4, 4] and centres[2].tolist() == [12, 4] and centres[-1].tolist() == [8, 24]
    sides = first[:, 2:] - first[:, :2]
    assert sides[0].tolist() == [16, 16] and sides[-1].tolist() == [46, 22]  # height half the width, whole pixels


def test_boxes_are_pooled_at_the_levels_own_scale_whatever_the_images_sizes_are() -> None:
    levels = {"0": torch.arange(16.0).repeat(16, 1).view(1, 1, 16, 16), "1": torch.zeros(1, 1, 8, 8)}
    pool = RoiPool(2, 7, 64)
    box = torch.tensor([[8.0, 8, 24, 24]])
    # torchvision would infer 16 cells / 20 pixels: a scale of 1 instead of 1/4
    pooled = pool(levels, [box], [(20, 20)])
    assert abs(float(pooled.mean()) - 4) < 0.1
    assert torch.equal(pool(levels, [box], [(64, 64)]), pooled)
