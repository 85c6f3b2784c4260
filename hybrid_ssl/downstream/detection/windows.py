"""Window attention in a plain ViT, as ViTDet has it (arXiv 2203.16527): it makes 1024 pixels affordable.

Attention over all tokens of a picture grows with the square of their number: 4,096 tokens at 1024 pixels. ViTDet lets
tokens attend within squares of 14 x 14 only, except in four blocks, the last of each quarter, which attend globally.
Parameters and their names stay the same, so pretrained weights fit. Sides that are no multiple of the window are padded
with zeros after the norm, which take part in the attention, as in ViTDet. A class token or registers, which ViTDet does
not have, belong to no window: they are left out of it and change in the global blocks (and in every MLP) only.

It is done by two hooks on `attn`: they leave keys, stochastic depth, layer groups and checkpointing as they are.

Shapes: B images, P prefix tokens, side x side patches, D width, w the window's side, n windows of an image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders import Taps


def use_windows(encoder: Any, taps: Taps, window: int) -> None:
    """Let all blocks but those that `taps` read (the last of each quarter) attend within windows.

    Args:
        encoder: timm's ViT, which will see square pictures; call it once for a model.
        window: side in tokens.

    Raises:
        ValueError: it is no plain ViT.
    """
    blocks = getattr(encoder, "blocks", None)
    if blocks is None or len(set(taps.strides)) > 1 or getattr(encoder, "rope", None) is not None:
        raise ValueError(
            f"model.window: {type(encoder).__name__} is no plain ViT, whose attention could be cut into windows: give "
            "null (a Swin has windows of its own)"
        )
    for number, block in enumerate(blocks):
        if number not in taps.indices:
            windows = Windows(int(getattr(encoder, "num_prefix_tokens", 0)), window)
            block.attn.register_forward_pre_hook(windows.cut)
            block.attn.register_forward_hook(windows.join)


class Windows:
    """What one block's attention sees."""

    def __init__(self, prefix: int, window: int) -> None:
        self.prefix, self.window = prefix, window
        self.images = self.side = 0
        """of the pass that is under way"""

    def cut(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[B, P + side * side, D] -> [B * n, w * w, D]."""
        tokens, *others = inputs
        self.images, self.side = len(tokens), math.isqrt(tokens.shape[1] - self.prefix)
        grid = tokens[:, self.prefix :].unflatten(1, (self.side, self.side))
        more = -self.side % self.window
        grid = F.pad(grid, (0, 0, 0, more, 0, more))
        w = self.window
        squares = grid.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)  # [B, rows, columns, w, w, D]
        return (squares.flatten(3, 4).flatten(0, 2), *others)

    def join(self, module: nn.Module, inputs: Any, attended: Tensor) -> Tensor:
        """[B * n, w * w, D] -> [B, P + side * side, D], zeros for prefix tokens."""
        w, across = self.window, -(-self.side // self.window)
        squares = attended.view(self.images, across, across, w, w, attended.shape[-1]).transpose(2, 3)
        grid = squares.flatten(3, 4).flatten(1, 2)[:, : self.side, : self.side]  # [B, side, side, D]
        nothing = attended.new_zeros(self.images, self.prefix, attended.shape[-1])
        return torch.cat([nothing, grid.flatten(1, 2)], dim=1)
