from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as TimmBlock

from hybrid_ssl.nn import attention
from hybrid_ssl.nn.attention import Block, attend, prefers_fused


def test_both_paths_give_the_same_numbers_and_gradients() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 7, 7))
    plain, fused = attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(plain, fused)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (plain, fused)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v), fused)


def test_large_weights_are_computed_again_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 7, 7))
    kept = attend(q, k, v)
    monkeypatch.setattr(attention, "_KEPT", 0)
    monkeypatch.setattr(attention, "_CACHED", 4 * 4 * 7 * 8)  # four of six heads at a time
    again = attend(q, k, v)
    assert "Recomputed" in type(again.grad_fn.next_functions[0][0]).__name__ + type(again.grad_fn).__name__
    torch.testing.assert_close(again, kept)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (again, kept)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("device", "dtype", "length", "training", "fused"),
    [
        ("cpu", torch.bfloat16, 197, True, False),
        ("cpu", torch.bfloat16, 1024, True, True),
        ("cpu", torch.float32, 37, True, False),
        ("cpu", torch.float32, 197, True, True),
        ("cpu", torch.bfloat16, 197, False, True),
        ("cpu", torch.bfloat16, 37, False, False),
        ("cuda", torch.bfloat16, 37, True, True),
    ],
)
def test_path_follows_the_measurements(
    device: str, dtype: torch.dtype, length: int, training: bool, fused: bool
) -> None:
    assert prefers_fused(device, dtype, length, training) is fused


def test_block_equals_timms_with_the_same_weights() -> None:
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = TimmBlock(24, 3, mlp_ratio=2.0, qkv_bias=True, norm_layer=norm).double()
    ours = Block(24, 3, mlp_ratio=2.0).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_last_tokens_alone_equal_the_last_tokens_of_all() -> None:
    block = Block(24, 3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    full, part = block(x)[:, -3:], block(x, last=3)
    torch.testing.assert_close(part, full)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (part, full)), strict=True):
        torch.testing.assert_close(a, b)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="5 attention heads do not divide a width of 24"):
        Block(24, 5)
