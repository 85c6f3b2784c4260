"""Sheets of pictures: what the encoder is really shown, and what a masked-image model makes of it.

A wrong crop scale, a jitter that turns everything green or a mask on the wrong grid are seen here in a second and in
no loss curve for hours. Crops are drawn in proportion to their size in pixels. Images with 1 or 2 channels are shown
by their first one in gray, with more than 3 by the first three.

Shapes: B images, V crops of a view group (stacked view-major), N patches in row-major order, True = hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, FAINT, PAPER = "#22262b", "#7d858e", "#ffffff"
_HIDDEN = torch.tensor([183, 206, 233], dtype=torch.uint8)  # flat pale blue: hardly any image content looks like it
_HUES = torch.tensor([97, 157, 223])  # odd: none of 256 ids looks like another
_GAP, _MARGIN, _HEAD = 8, 16, 40


@dataclass(frozen=True)
class Column:
    """One column of a sheet: a title, a smaller second line, and uint8 pictures [B, C, H, W]."""

    title: str
    note: str
    pictures: Tensor


def view_sheet(
    views: Mapping[str, Tensor],
    crops: Mapping[str, int],
    masks: Mapping[str, Tensor] | None = None,
    mask_views: Mapping[str, str] | None = None,
    grids: Mapping[str, tuple[int, int]] | None = None,
    images: int = 6,
    cell: int = 112,
) -> Image.Image:
    """A row for each image, a column for each crop, and one more for each crop under each mask.

    Args:
        views: name -> uint8 [V*B, C, H, W].
        crops: name -> V.
        masks: name -> bool [V*B, N].
        mask_views: mask -> the view it is for.
        grids: view -> (rows, columns) of patches.
        images: rows shown at most.
        cell: pixels of the largest crop's longer side on the sheet.
    """
    columns = []
    for name, view in views.items():
        for v, part in enumerate(view.chunk(crops[name])):
            columns.append(Column(_numbered(name, v, crops[name]), _size(part), part))
        for mask, hidden in (masks or {}).items():
            if (mask_views or {})[mask] != name:
                continue
            for v, (part, cover) in enumerate(zip(view.chunk(crops[name]), hidden.chunk(crops[name]), strict=True)):
                share = f"{cover.float().mean():.0%} hidden"
                columns.append(Column(_numbered(mask, v, crops[name]), share, cover_patches(part, cover, grids, name)))
    return sheet(columns, images, cell)


def as_pictures(view: Tensor) -> Tensor:
    """Other modalities as pictures: a continuous map from its lowest value to its highest, a label map in colours.

    uint8 [V*B, C, H, W] as it is; float [V*B, C, H, W]; or ids [V*B, 1, H, W] of another integer type -> uint8.
    """
    if view.dtype == torch.uint8:
        return view
    if not view.is_floating_point():
        return (view.long() * _HUES.view(1, 3, 1, 1) % 256).to(torch.uint8)
    low, high = view.flatten(1).aminmax(dim=1)
    scaled = (view - low.view(-1, 1, 1, 1)) / (high - low).clamp(min=1e-12).view(-1, 1, 1, 1)
    return (scaled * 255).round().to(torch.uint8)


def reconstruction_sheet(
    original: Tensor,
    mask: Tensor,
    predicted: Tensor,
    grid: tuple[int, int],
    images: int = 8,
    cell: int = 112,
) -> Image.Image:
    """Original, what was seen, what was predicted, and the prediction pasted into what was seen.

    Args:
        original: uint8 [B, C, H, W].
        mask: bool [B, N].
        predicted: uint8 [B, C, H, W], or float in 0..1.
        grid: (rows, columns) of patches.
    """
    if predicted.is_floating_point():
        predicted = (predicted.clamp(0, 1) * 255).round().to(torch.uint8)
    hidden = pixels_of(mask, grid, (original.shape[2], original.shape[3]))
    columns = [
        Column("original", _size(original), original),
        Column("seen", f"{mask.float().mean():.0%} hidden", cover_patches(original, mask, {"": grid}, "")),
        Column("predicted", "all patches", predicted),
        Column("filled in", "hidden ones only", torch.where(hidden.to(original.device), predicted, original)),
    ]
    return sheet(columns, images, cell, blocks=2 if min(images, len(original)) > 4 else 1)


def pixels_of(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A mask of patches as one of pixels: bool [B, N] -> [B, 1, H, W]."""
    rows, columns = grid
    if mask.shape[1] != rows * columns:
        raise ValueError(f"a mask of {mask.shape[1]} patches does not fit a grid of {rows} x {columns}")
    fine = mask.view(-1, 1, rows, columns)
    return fine.repeat_interleave(size[0] // rows, dim=2).repeat_interleave(size[1] // columns, dim=3)


def cover_patches(view: Tensor, mask: Tensor, grids: Mapping[str, tuple[int, int]] | None, name: str) -> Tensor:
    """Pictures [B, 3, H, W] with flat pale blue where `mask` hides a patch."""
    if not grids or name not in grids:
        raise ValueError(f"drawing a mask needs the patch grid of view {name!r}")
    hidden = pixels_of(mask, grids[name], (view.shape[2], view.shape[3])).cpu()
    return torch.where(hidden, _HIDDEN.view(1, 3, 1, 1), _three_channels(view.cpu()))


def sheet(columns: Sequence[Column], images: int, cell: int, blocks: int = 1) -> Image.Image:
    """Columns of pictures with titles on a white sheet; `blocks` > 1 sets the rows side by side in groups."""
    if not columns:
        raise ValueError("there are no views to draw")
    shown = min(images, *(len(column.pictures) for column in columns))
    rows = -(-shown // blocks)
    factor = cell / max(max(column.pictures.shape[2:]) for column in columns)
    sizes = [(round(c.pictures.shape[3] * factor), round(c.pictures.shape[2] * factor)) for c in columns]
    widths = [max(width, _text_width(column)) for (width, _), column in zip(sizes, columns, strict=True)]
    height = max(size[1] for size in sizes)
    block_width = sum(widths) + _GAP * (len(widths) - 1)
    page_width = 2 * _MARGIN + block_width * blocks + 3 * _GAP * (blocks - 1)
    page_height = 2 * _MARGIN + _HEAD + rows * (height + _GAP) - _GAP
    page = Image.new("RGB", (page_width, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    for block in range(blocks):
        x = _MARGIN + block * (block_width + 3 * _GAP)
        for column, size, width in zip(columns, sizes, widths, strict=True):
            draw.text((x, _MARGIN), column.title, INK, font(14))
            draw.text((x, _MARGIN + 18), column.note, FAINT, font(11))
            for row, picture in enumerate(column.pictures[block * rows : min(shown, (block + 1) * rows)]):
                page.paste(_resized(picture, size), (x, _MARGIN + _HEAD + row * (height + _GAP)))
            x += width + _GAP
    return page


def _resized(picture: Tensor, size: tuple[int, int]) -> Image.Image:
    """[C, H, W] uint8 -> RGB of the given (width, height); pixels stay visible when enlarged."""
    image = Image.fromarray(_three_channels(picture.cpu()[None])[0].permute(1, 2, 0).contiguous().numpy())
    if image.size == size:
        return image
    return image.resize(size, Image.Resampling.NEAREST if size[0] > image.width else Image.Resampling.LANCZOS)


def _three_channels(pictures: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 3, H, W]."""
    if pictures.dtype != torch.uint8:
        raise ValueError(f"pictures are uint8 [B, C, H, W], got {pictures.dtype} {tuple(pictures.shape)}")
    return pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1].expand(-1, 3, -1, -1)


def _numbered(name: str, index: int, of: int) -> str:
    return name if of == 1 else f"{name} {index + 1}"


def _size(pictures: Tensor) -> str:
    return f"{pictures.shape[3]} x {pictures.shape[2]}"


def _text_width(column: Column) -> int:
    return round(max(font(14).getlength(column.title), font(11).getlength(column.note)))


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface in the given pixels."""
    return ImageFont.load_default(size)
