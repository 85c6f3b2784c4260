"""Which sizes of an encoder's input may change in a traced graph, and how such a graph is checked.

The batch may always. Height and width may for a timm VisionTransformer with `dynamic_img_size`, whose positions are
then resampled inside the graph. Windows (Swin) and rotary angles are computed for one size while tracing, so that size
is the only one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.export import Dim, ExportedProgram

from .source import Features, Source


def any_size(source: Source) -> bool:
    """Whether height and width may change."""
    return type(source.model) is VisionTransformer and bool(source.model.dynamic_img_size)


def trace(source: Source) -> ExportedProgram:
    """The encoder as `torch.export` sees it."""
    channels, height, width = source.size
    free: dict[int, Any] = {0: Dim("batch")}
    if any_size(source):
        free |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
        height, width = (side + 2 * _patch(source) for side in (height, width))  # the trained size would be special
        width += _patch(source)  # and so would a square
    images = torch.zeros(2, channels, height, width)
    with torch.no_grad():
        return torch.export.export(Features(source.model), (images,), dynamic_shapes={"images": free}, strict=False)


def describe(source: Source) -> str:
    """What may be fed to the graph."""
    channels, height, width = source.size
    if any_size(source):
        return f"images [B, {channels}, H, W]: any batch, H and W any multiple of {_patch(source)}"
    return f"images [B, {channels}, {height}, {width}]: any batch, this size only"


def check(source: Source, run: Callable[[Tensor], Sequence[Tensor]], tolerance: float) -> str:
    """Compare `run(images)` with the encoder at several batches, and sizes if they may change.

    Raises:
        ValueError: it computes something else; by how much.
    """
    shapes, off = _shapes(source), [0.0]
    for number, shape in enumerate(shapes):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            expected, outputs = Features(source.model)(images), run(images)
        for name, found, target in zip(("features", "tokens"), outputs, expected, strict=True):
            if found.shape != target.shape:
                raise ValueError(f"the graph gives {name} {tuple(found.shape)} instead of {tuple(target.shape)}")
            off.append(float((found - target).abs().max() / target.abs().max().clamp(min=1e-6)))
    if not all(each <= tolerance for each in off):  # NaN is not
        raise ValueError(f"the graph computes something else than the encoder, off by {off} of the largest value")
    tried = ", ".join("x".join(map(str, shape)) for shape in shapes)
    return f"equal to torch within {max(off):.1g} of the largest value, at {tried}"


def _shapes(source: Source) -> list[tuple[int, int, int, int]]:
    channels, height, width = source.size
    shapes = [(1, channels, height, width), (3, channels, height, width)]
    if any_size(source):
        shapes.append((2, channels, height + _patch(source), max(_patch(source), width - _patch(source))))
    return shapes


def _patch(source: Source) -> int:
    return int(source.model.patch_embed.patch_size[0])
