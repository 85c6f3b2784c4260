"""Sliding windows: predict a large image in overlapping crops of the training size, and average their scores.

The last window of a row or column is moved inwards to end at the border, as in mmsegmentation. Scores (logits) are
averaged, so one window that covers all is exactly the whole image's prediction.
Shapes: B images, C channels, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

Size = tuple[int, int]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one at the end."""
    last = max(0, length - window)
    return sorted({min(start, last) for start in range(0, last + stride, stride)})


def windows(size: Size, window: Size, stride: Size) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each window over an image of `size`; together they cover every pixel."""
    for top in starts(size[0], window[0], stride[0]):
        for left in starts(size[1], window[1], stride[1]):
            yield slice(top, top + window[0]), slice(left, left + window[1])


def slide(scores: Callable[[Tensor], Tensor], images: Tensor, window: Size, stride: Size) -> Tensor:
    """Average of `scores` over all windows: [B, C, H, W] -> [B, K, H, W].

    Args:
        scores: [B, C, h, w] -> [B, K, h, w].
        window: height and width; a side that is longer than the image's is cut to it.
        stride: at most the window, or pixels would be left out.

    Raises:
        ValueError: the stride is larger than the window.
    """
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"windows of {window} pixels at every {stride} leave pixels out: lower test.stride")
    total: Tensor | None = None
    for rows, columns in windows((images.shape[-2], images.shape[-1]), window, stride):
        part = scores(images[..., rows, columns])
        if total is None:
            total = part.new_zeros(len(images), part.shape[1], *images.shape[-2:])
            count = part.new_zeros(1, 1, *images.shape[-2:])
        total[..., rows, columns] += part
        count[..., rows, columns] += 1
    assert total is not None
    return total / count
