"""I-JEPA's predictor: from context tokens and the positions of a block to the features of that block.

After arXiv 2301.08243, section 3: a narrow ViT with fixed sine-cosine positions sees the context and one learned mask
token for each position of the block, and is read at those. Each block is predicted by itself: no block sees another.
Equal in value to the published form, at less cost: the last transformer block, the norm and the projection run for the
positions that are read only. Linear layers start as truncated normals of deviation 0.02; the published code's smaller
start of deep layers is undone by its own second initialisation, so it is left out.

Shapes: R rows (crops), T target blocks of n tokens each, v context tokens, D encoder width, d predictor width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Block
from .precision import for_weight
from .sincos import sincos_2d


class Predictor(nn.Module):
    """Light transformer that fills blocks of positions in.

    Args:
        width: D, width of the encoder's tokens, which are also predicted.
        grid: (rows, columns) of patches.
        dim: d, width inside; a multiple of 4 and of `heads`.
    """

    pos_embed: Tensor

    def __init__(self, width: int, grid: tuple[int, int], dim: int = 384, depth: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # three axes: weight decay applies to it, as published
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, width)
        self.register_buffer("pos_embed", sincos_2d(dim, grid), persistent=False)  # [N, d], a function of the grid
        self.apply(_init)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
        """Predicted features of every block.

        Args:
            context: [R, v, D], encoded context tokens.
            seen: [R, v] int64, their positions in 0 .. N-1.
            wanted: [R, T, n] int64, positions of the blocks.

        Returns:
            [R, T, n, D], in the order of `wanted`.
        """
        rows, targets, n = wanted.shape
        known = self.embed(for_weight(context, self.embed.weight)) + self.pos_embed[seen]  # [R, v, d]
        asked = self.mask_token + self.pos_embed[wanted.flatten(0, 1)]  # [R * T, n, d]
        known = known.unsqueeze(1).expand(-1, targets, -1, -1).flatten(0, 1)  # [R * T, v, d]
        x = torch.cat([known, asked.to(known.dtype)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, last=n)  # [R * T, n, d]
        predicted: Tensor = self.proj(self.norm(x))
        return predicted.unflatten(0, (rows, targets))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
