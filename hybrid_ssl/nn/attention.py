"""Softmax attention by the faster of two exact paths, and the transformer block built on it.

On a CPU the backward pass of torch's fused attention takes 5 to 14 times as long as that of plain matrix products in
bfloat16, and up to 1.6 times in float32 (torch 2.14; its cost hardly depends on the length, so short sequences suffer
most). Elsewhere the fused kernel is faster and does not keep the N x N weights. Shapes: B images, H heads, N tokens,
d width of a head, D = H * d.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; [B, H, n, d], [B, H, N, d], [B, H, N, d] -> [B, H, n, d]."""
    if prefers_fused(q.device.type, k.shape[-2], training=torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, n, N]
    return weights.softmax(dim=-1) @ v


def prefers_fused(device: str, length: int, training: bool) -> bool:
    """Whether torch's fused attention is the faster path for keys of `length` tokens."""
    if device != "cpu":
        return True
    # Training: plain products, until the kept N x N weights outgrow what the time saved is worth.
    return length > 1024 if training else length >= 50


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with `last`, only the last tokens ask: [B, last, D], while all N answer."""
        if last is None:
            q, k, v = (self._split(y) for y in self.qkv(x).chunk(3, dim=-1))
        else:
            dim = x.shape[-1]
            weight, bias = self.qkv.weight, self.qkv.bias
            q = self._split(F.linear(x[:, -last:], weight[:dim], bias[:dim]))
            k, v = (self._split(y) for y in F.linear(x, weight[dim:], bias[dim:]).chunk(2, dim=-1))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, D] -> [B, H, N, d]


class Mlp(nn.Module):
    """Two linear layers with a GELU in between, on every token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; parameters are named and shaped like timm's `Block`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide a width of {dim}")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with `last`, exactly the last rows of that at less cost: [B, last, D]."""
        x = (x if last is None else x[:, -last:]) + self.attn(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))
