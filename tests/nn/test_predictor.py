import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.predictor import Predictor
from hybrid_ssl.nn.sincos import sincos_2d

GRID = (3, 4)


def build() -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(10, GRID, dim=16, depth=2, heads=2).double()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return predictor


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    seen = torch.rand(3, 12, generator=draw).argsort(1)[:, :5].sort(1).values
    wanted = torch.rand(3, 2, 12, generator=draw).argsort(2)[..., :4].sort(2).values
    return torch.randn(3, 5, 10, generator=draw, dtype=torch.float64), seen, wanted


def one_by_one(predictor: Predictor, context: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """Every block by itself, whole transformer blocks, read at the end."""
    table = sincos_2d(16, GRID).double()
    out = torch.zeros(*wanted.shape, 10, dtype=torch.float64)
    for row in range(wanted.shape[0]):
        for block in range(wanted.shape[1]):
            known = predictor.embed(context[row]) + table[seen[row]]
            asked = predictor.mask_token[0] + table[wanted[row, block]]
            x = torch.cat([known, asked])[None]
            for layer in predictor.blocks:
                x = layer(x)
            out[row, block] = predictor.proj(predictor.norm(x))[0, len(known) :]
    return out


def test_blocks_in_one_batch_equal_blocks_one_by_one() -> None:
    predictor = build()
    context, seen, wanted = inputs()
    found, expected = predictor(context, seen, wanted), one_by_one(predictor, context, seen, wanted)
    torch.testing.assert_close(found, expected)
    parameters = list(predictor.parameters())
    weights = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), parameters) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_prediction_depends_on_its_own_row_and_block_only() -> None:
    predictor = build()
    context, seen, wanted = inputs()
    before = predictor(context, seen, wanted)
    moved = wanted.clone()
    moved[1, 0] = (moved[1, 0] + 1) % 12
    changed = (predictor(context, seen, moved) - before).abs().amax((2, 3)) > 1e-9
    assert changed.nonzero().tolist() == [[1, 0]]
    other = context.clone()
    other[2] += 1
    changed = (predictor(other, seen, wanted) - before).abs().amax((2, 3)) > 1e-9
    assert changed.nonzero().tolist() == [[2, 0], [2, 1]]


def test_positions_are_no_state_and_biases_start_at_zero() -> None:
    predictor = Predictor(10, GRID, dim=16, depth=1, heads=2)
    assert "pos_embed" not in predictor.state_dict()
    assert not predictor.embed.bias.any() and predictor.mask_token.any()


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="3 attention heads do not divide a width of 16"):
        Predictor(10, GRID, dim=16, depth=1, heads=3)
