"""The decoder of one modality in a multi-modal masked autoencoder: its tokens ask, all encoded tokens answer.

After MultiMAE (arXiv 2204.01678, section 3.2). Queries are the tokens of the decoder's own modality, encoded ones where
they are visible and mask tokens elsewhere; keys and values are all encoded tokens of all modalities, plus the one that
stands for the whole sample. What comes back from the cross-attention *replaces* the queries: there is no residual
around it, and no norm before the prediction. Position and modality are added in the decoder's own width.

Equal to the published form at less cost: queries and keys are gathered directly, without first filling a canvas of all
modalities. Shapes: R crops, M modalities of N tokens each, n visible tokens of all, D encoder width, d decoder width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .attention import Block, FeedForward, attend
from .precision import for_weight
from .sincos import sincos_2d


class CrossAttention(nn.Module):
    """Multi-head attention of some tokens to others."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """[R, N, d], [R, n, d] -> [R, N, d]."""
        k, v = (self._split(x) for x in self.kv(context).chunk(2, dim=-1))
        return self.proj(attend(self._split(self.q(queries)), k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [R, N, d] -> [R, heads, N, d / heads]


class CrossDecoder(nn.Module):
    """Predictions for all tokens of one modality.

    Args:
        width: D.
        grid: (rows, columns) of tokens, the same for every modality.
        own: number of this decoder's modality in 0 .. M-1.
        modalities: M.
        out: values predicted for a token.
        dim: d, a multiple of 4 and of `heads`.
        depth: self-attention blocks after the cross-attention.
    """

    positions: Tensor

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        own: int,
        modalities: int,
        out: int,
        dim: int = 256,
        depth: int = 2,
        heads: int = 8,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.own = own
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.modality = nn.Parameter(torch.empty(modalities, dim))
        self.query_norm, self.context_norm = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.cross = CrossAttention(dim, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.pred = nn.Linear(dim, out)
        self.register_buffer("positions", sincos_2d(dim, grid), persistent=False)  # [N, d], a function of the grid
        _initialise(self)

    def forward(self, cls: Tensor, patches: Tensor, visible: Tensor) -> Tensor:
        """Predictions for visible and hidden tokens alike.

        Args:
            cls: [R, D], what stands for the whole sample.
            patches: [R, n, D], encoded visible tokens.
            visible: [R, n] int64, which of the M*N tokens they are, modality by modality.

        Returns:
            [R, N, out]
        """
        count = len(self.positions)
        tokens = torch.cat([cls.unsqueeze(1), patches], dim=1)
        tokens = self.embed(for_weight(tokens, self.embed.weight))  # [R, 1 + n, d]
        whole, seen = tokens[:, :1], tokens[:, 1:]
        asked = self._queries(seen, visible) + self.positions + self.modality[self.own]
        seen = seen + self.positions[visible % count] + self.modality[visible // count]
        context = torch.cat([seen, whole], dim=1)
        x = self.cross(self.query_norm(asked), self.context_norm(context))  # no residual, as in the released models
        x = x + self.mlp(self.norm(x))
        return self.pred(self.blocks(x))

    def _queries(self, seen: Tensor, visible: Tensor) -> Tensor:
        """Mask tokens [R, N, d] with the visible tokens of this modality in their places."""
        rows, count = len(seen), len(self.positions)
        place = visible - self.own * count
        # others all go to one place behind the last, which is cut off: their number differs from row to row
        place = torch.where((place >= 0) & (place < count), place, count).unsqueeze(-1).expand_as(seen)
        slots = self.mask_token.to(seen.dtype).expand(rows, count + 1, -1)
        return slots.scatter(1, place, seen)[:, :count]


def _initialise(decoder: CrossDecoder) -> None:
    """MultiMAE's: Xavier with queries, keys and values as matrices of their own, zero biases."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            matrices = {"qkv": 3, "kv": 2}.get(name.rsplit(".", 1)[-1], 1)
            bound = math.sqrt(6 / (module.in_features + module.out_features // matrices))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(decoder.modality, std=0.02)
