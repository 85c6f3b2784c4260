"""The decoder of a masked autoencoder: visible tokens in, predictions at hidden positions out.

After MAE (arXiv 2111.06377, section 3). Two exact savings against the usual form: tokens stay in the order [class,
visible, hidden] with their positions gathered, since attention does not care for order and the loss reads the hidden
ones; and the last block, norm and prediction run for the hidden tokens only. Parameter names are those of the paper's
code without the prefix `decoder_`. Shapes: B images, N patches, D encoder width, d decoder width, L values predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Block
from .patches import gather_rows
from .precision import for_weight
from .sincos import sincos_2d


class Decoder(nn.Module):
    """Light transformer over encoded visible tokens and mask tokens, with fixed sine-cosine positions.

    Args:
        width: D, width of the encoder's tokens.
        grid: (rows, columns) of patches.
        out: L, values predicted at each hidden position.
        dim: d, width inside; a multiple of 4 and of `heads`.
    """

    pos_embed: Tensor

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        out: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))  # three axes: weight decay applies to it, as in MAE
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out)
        table = sincos_2d(dim, grid, cls=True).unsqueeze(0)  # [1, 1 + N, d]
        self.register_buffer("pos_embed", table, persistent=False)  # a function of the grid, hence no part of the state
        self.apply(_init)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, cls: Tensor, patches: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predictions at the hidden positions.

        Args:
            cls: [B, D], class token or whatever stands for the whole image.
            patches: [B, N_visible, D], encoded visible patches.
            visible: [B, N_visible] int64, their positions in 0 .. N-1.
            hidden: [B, N_hidden] int64, the other positions.

        Returns:
            [B, N_hidden, L], in the order of `hidden`.
        """
        return self.pred(self.norm(self._decode(cls, patches, visible, hidden, last=hidden.shape[1])))

    def mean(self, cls: Tensor, patches: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Mean of the predictions at all N patches, visible and hidden: [B, L]. The arguments are those of `forward`.

        Taken before the linear layer, which gives the same for one row instead of N.
        """
        x = self._decode(cls, patches, visible, hidden, last=visible.shape[1] + hidden.shape[1])
        return self.pred(self.norm(x).mean(1))

    def _decode(self, cls: Tensor, patches: Tensor, visible: Tensor, hidden: Tensor, last: int) -> Tensor:
        """The last block's output at the `last` tokens of [class, visible, hidden]: [B, last, d]."""
        b, n = hidden.shape
        known = torch.cat([cls.unsqueeze(1), patches], dim=1)
        known = self.embed(for_weight(known, self.embed.weight))  # [B, 1 + N_visible, d]
        order = torch.cat([visible.new_full((b, 1), -1), visible, hidden], dim=1) + 1  # position 0 is the class token's
        x = torch.cat([known, self.mask_token.expand(b, n, -1)], dim=1)  # [B, 1 + N, d]
        x = x + gather_rows(self.pos_embed.expand(b, -1, -1), order)
        for block in self.blocks[:-1]:
            x = block(x)
        out: Tensor = self.blocks[-1](x, last=last)
        return out


def _init(module: nn.Module) -> None:
    """MAE's: Xavier-uniform weights (queries, keys, values as one matrix), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
