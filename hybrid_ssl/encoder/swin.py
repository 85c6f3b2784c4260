"""timm SwinTransformer and SwinTransformerV2: patches can be replaced, a 32-pixel unit at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..plan import Tokens
from .base import Encoder


class SwinEncoder(Encoder):
    """timm SwinTransformer and SwinTransformerV2. A mask is given on the output grid, one bit for 32 pixels."""

    family = "swin"

    @property
    def stride(self) -> int:
        return int(self.model.patch_embed.patch_size[0]) * 2 ** (len(self.model.layers) - 1)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.model.layers for block in stage.blocks]

    def _token_dim(self) -> int:
        return int(self.model.embed_dim)

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        *,
        visible: int | None = None,
        positions: bool = True,
        layers: int = 0,
        beside: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tokens:
        if visible is not None:
            raise ValueError(
                "Swin's windows need every patch: hidden patches can be replaced (SimMIM), not dropped (MAE)"
            )
        x = self.model.patch_embed(images)  # [R, H/4, W/4, C]
        if mask is not None:
            assert self.mask_token is not None, "built without mask token"
            unit = 2 ** (len(self.model.layers) - 1)
            units = mask.view(len(x), x.shape[1] // unit, x.shape[2] // unit)
            hidden = units.repeat_interleave(unit, 1).repeat_interleave(unit, 2)  # [R, H/4, W/4]
            x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        self._choose_attention(math.prod(self.model.layers[0].blocks[0].window_size))
        for stage in self.model.layers:
            x, outputs = stage.downsample(x), []  # [R, h, w, c], and each block's
            for block in stage.blocks:
                x = self._run(block, x, noise)
                outputs.append(x.flatten(1, 2))
        x = self.model.norm(x)  # [R, H/32, W/32, D]
        kept = tuple(outputs[len(outputs) - layers :])  # of the last stage
        return Tokens(self.model.forward_head(x, pre_logits=True), x.flatten(1, 2), kept)

    @property
    def layers(self) -> int:
        return len(self.model.layers[-1].blocks)

    def check_windows(self, height: int, width: int) -> None:
        """ValueError when some stage's grid is larger than its window and no multiple of it."""
        patch = int(self.model.patch_embed.patch_size[0])
        for depth, stage in enumerate(self.model.layers):
            window = stage.blocks[0].window_size
            grid = (height // (patch * 2**depth), width // (patch * 2**depth))
            if any(side > w and side % w for side, w in zip(grid, window, strict=True)):
                raise ValueError(
                    f"image size {height} x {width}: stage {depth + 1} has {grid[0]} x {grid[1]} tokens, no multiple "
                    f"of its {window[0]} x {window[1]} window; set encoder.args.window_size to a divisor (6 for 192, 7 "
                    f"for 224, 8 for 256 pixels) or choose a multiple of {self.stride * window[0]} pixels"
                )
