"""The systems' encoders written down once more: tensors with official names, and passes that read these names.

Nothing here knows timm or the code under test. Widths are small; values are float32, passes are in the images' type.
Shapes: B images, T tokens, D width, h heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
DIM, HEADS, DEPTH = 24, 3, 2


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int) -> State:
    """Random values, norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {
        name: 1 + t if "norm" in name and name.endswith("weight") and t.ndim == 1 else t for name, t in made.items()
    }


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def under(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, dim: int = DIM) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def vit_shapes(patch: int = 4, grid: int = 4, *, tokens: int = 1, last: str = "norm") -> dict[str, tuple[int, ...]]:
    """A ViT as MAE, MoCo v3, DINO, iBOT, MSN and I-JEPA call its parts."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, DIM)} if tokens else {}
    shapes |= {"pos_embed": (1, grid * grid + tokens, DIM)}
    shapes |= {"patch_embed.proj.weight": (DIM, 3, patch, patch), "patch_embed.proj.bias": (DIM,)}
    for i in range(DEPTH):
        name = f"blocks.{i}"
        shapes |= (
            norm(f"{name}.norm1") | linear(f"{name}.attn.qkv", 3 * DIM, DIM) | linear(f"{name}.attn.proj", DIM, DIM)
        )
        shapes |= norm(f"{name}.norm2") | linear(f"{name}.mlp.fc1", 4 * DIM, DIM)
        shapes |= linear(f"{name}.mlp.fc2", DIM, 4 * DIM)
    return shapes | norm(last)


def layer_norm(s: State, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), s[f"{name}.weight"], s[f"{name}.bias"], eps)


def dense(s: State, name: str, x: Tensor) -> Tensor:
    return x @ s[f"{name}.weight"].mT + s[f"{name}.bias"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor | float = 0.0,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softmax attention: [B, T, D] each -> [B, T, D]; bias [h, T, T]; turn rotates queries and keys [B, h, T, d]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if turn is not None:
        q, k = turn(q), turn(k)
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def patches(s: State, name: str, images: Tensor) -> Tensor:
    weight = s[f"{name}.weight"]
    return F.conv2d(images, weight, s[f"{name}.bias"], stride=weight.shape[-1]).flatten(2).mT


def vit(s: State, images: Tensor, last: str | None = "norm") -> Tensor:
    """Tokens behind the last norm, class token first: [B, T, D]."""
    x = patches(s, "patch_embed.proj", images)
    if "cls_token" in s:
        x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + s["pos_embed"]
    for i in range(DEPTH):
        x = plain_block(s, f"blocks.{i}", x)
    return layer_norm(s, last, x) if last else x


def plain_block(s: State, name: str, x: Tensor) -> Tensor:
    q, k, v = dense(s, f"{name}.attn.qkv", layer_norm(s, f"{name}.norm1", x)).chunk(3, -1)
    x = x + dense(s, f"{name}.attn.proj", attend(q, k, v, HEADS))
    return x + dense(s, f"{name}.mlp.fc2", F.gelu(dense(s, f"{name}.mlp.fc1", layer_norm(s, f"{name}.norm2", x))))


def window_index(side: int) -> Tensor:
    """[side^2, side^2] rows of a table of relative positions."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    apart = at[:, None] - at[None] + side - 1
    return apart[..., 0] * (2 * side - 1) + apart[..., 1]
