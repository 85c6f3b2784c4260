"""Softmax attention by the faster of two exact paths, and the transformer block built on it.

On a CPU the backward pass of torch's fused attention has a high cost per head that hardly depends on the length. One
training step of it, relative to plain matrix products (torch 2.14, one core with AMX, width of a head 64):

    tokens      17    37    50   197   400   577  1024
    bfloat16   4.7   6.0   4.3   2.1   1.5   1.9   0.8
    float32    1.1   1.3   1.3   0.8   0.9   0.6   0.7

Elsewhere the fused kernel is faster, and it never keeps the N x N weights. Nor do we where they are large: they are
computed again in the backward pass, some heads at a time, so that they stay in the cache. That takes 0.8 times as long
for the decoder of MAE (128 heads of width 32, 197 tokens, bfloat16), 1.2 times for 96 heads of width 64; in a whole
step of MAE it is no difference in time and 6 % less memory. Shapes: B images, H heads, n queries, N tokens, d width of
a head, D = H * d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KEPT = 8 * 2**20  # bytes: smaller weights are kept, which measured 1.2 times as fast at 37 to 100 tokens
_CACHED = 2**20  # bytes of weights at a time: half of a core's L2 cache; measured as fast at 0.5 and 2 MB


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; [B, H, n, d], [B, H, N, d], [B, H, N, d] -> [B, H, n, d]."""
    training = torch.is_grad_enabled() and q.requires_grad
    if prefers_fused(q.device.type, q.dtype, k.shape[-2], training):
        return F.scaled_dot_product_attention(q, k, v)
    if training and q.shape[:-1].numel() * k.shape[-2] * q.itemsize > _KEPT:
        out: Tensor = _Recomputed.apply(*(x.flatten(0, 1) for x in (q, k, v)))
        return out.unflatten(0, q.shape[:2])
    return _weights(q * q.shape[-1] ** -0.5, k) @ v


def _weights(scaled: Tensor, k: Tensor) -> Tensor:
    return (scaled @ k.transpose(-2, -1)).softmax(dim=-1)  # [..., n, N]


class _Recomputed(torch.autograd.Function):
    """Attention of R heads, [R, n, d], [R, N, d], [R, N, d] -> [R, n, d], that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = torch.empty_like(q)
        for part in _parts(q, k):
            torch.bmm(_weights(q[part] * q.shape[-1] ** -0.5, k[part]), v[part], out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        (grad,) = grads
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        for part in _parts(q, k):
            scaled = q[part] * scale
            weights = _weights(scaled, k[part])  # [r, n, N]
            torch.bmm(weights.transpose(1, 2), grad[part], out=grad_v[part])
            along = torch.bmm(grad[part], v[part].transpose(1, 2))
            logits = torch.ops.aten._softmax_backward_data(along, weights, -1, weights.dtype)
            torch.bmm(logits, k[part], out=grad_q[part])
            torch.bmm(logits.transpose(1, 2), scaled, out=grad_k[part])
        return grad_q.mul_(scale), grad_k, grad_v


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Heads in groups whose weights fit the cache."""
    step = max(1, _CACHED // (q.shape[1] * k.shape[1] * q.itemsize))
    return [slice(first, first + step) for first in range(0, len(q), step)]


def prefers_fused(device: str, dtype: torch.dtype, length: int, training: bool) -> bool:
    """Whether torch's fused attention is the faster path for keys of `length` tokens of type `dtype`."""
    if device != "cpu":
        return True
    if not training:
        return length >= 50  # forward pass only: measured 1.6 times as slow at 37 tokens, as fast at 50
    return length > (640 if dtype.itemsize < 4 else 100)


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


class FeedForward(nn.Module):
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
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with `last`, exactly the last rows of that at less cost: [B, last, D]."""
        x = (x if last is None else x[:, -last:]) + self.attn(self.norm1(x), last)
        return x + self.mlp(self.norm2(x))
