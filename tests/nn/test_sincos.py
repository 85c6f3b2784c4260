import math

import pytest
import torch

from hybrid_ssl.nn.sincos import sincos_2d


def test_each_value_follows_the_formula_with_the_column_first() -> None:
    dim, grid = 12, (2, 3)
    table = sincos_2d(dim, grid)
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):  # MAE: the first half is the column's
                angles = [position / 10000 ** (k / (dim / 4)) for k in range(dim // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected))


def test_class_token_has_position_zero() -> None:
    table = sincos_2d(8, (2, 2), cls=True)
    assert table.shape == (5, 8) and table.dtype == torch.float32
    assert not table[0].any()
    assert torch.equal(table[1:], sincos_2d(8, (2, 2)))


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        sincos_2d(10, (2, 2))
