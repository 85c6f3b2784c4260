"""Masks over several modalities: exactly as many visible as wanted, with shares as a Dirichlet distribution draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_ssl.data.dirichlet import draw_dirichlet, mask_grid
from hybrid_ssl.data.masks import hidden_count, make_mask
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import DirichletMask, RandomMask

GRID, VISIBLE = (3, 196), 98


def settings(**more: object) -> DirichletMask:
    return DirichletMask(**{"kind": "dirichlet", "view": "rgb", "beside": ["a", "b"], "ratio": 0.8333, **more})


def draw(count: int, alpha: float = 1.0, grid: tuple[int, int] = GRID, visible: int = VISIBLE) -> Tensor:
    """Visible tokens of each modality in `count` masks: [count, M]."""
    masks = torch.stack([draw_dirichlet(alpha, visible, grid, keyed(0, 0, i, "mask")) for i in range(count)])
    assert masks.shape == (count, grid[0] * grid[1]) and masks.dtype == torch.bool
    assert ((~masks).sum(1) == visible).all()
    return (~masks).view(count, *grid).sum(2)


def test_98_of_588_tokens_stay_as_published() -> None:
    mask = make_mask(settings(), GRID, 16, keyed(0, 0, 0, "mask"))
    assert hidden_count(settings(), GRID, 16) == 490 and (~mask).sum() == 98


def test_flat_shares_have_the_mean_and_spread_of_a_dirichlet() -> None:
    shares = draw(800).double() / VISIBLE
    assert torch.allclose(shares.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03)
    # variance of a share under Dirichlet(1, 1, 1): 1/3 x 2/3 / 4 = 1/18; P(share < t) = 1 - (1 - t)^2
    assert torch.allclose(shares.var(0), torch.full((3,), 1 / 18, dtype=torch.float64), atol=0.008)
    assert (shares[:, 0] < 0.2).double().mean() == pytest.approx(0.36, abs=0.05)


def test_concentration_divides_evenly_or_takes_one_modality() -> None:
    even, one = draw(100, alpha=1000.0), draw(100, alpha=0.1)
    assert even.min() > 25 and even.max() < 40
    assert (one.max(1).values > 80).float().mean() > 0.5


def test_every_token_of_a_modality_is_as_likely() -> None:
    masks = torch.stack([draw_dirichlet(1.0, 12, (3, 16), keyed(0, 0, i, "mask")) for i in range(1000)])
    shown = (~masks).double().mean(0)
    assert torch.allclose(shown, torch.full((48,), 0.25, dtype=torch.float64), atol=0.05)


def test_more_than_a_modality_has_goes_to_the_others() -> None:
    counts = draw(200, alpha=0.1, grid=(2, 16), visible=20)
    assert counts.max() == 16 and counts.min() == 4


def test_of_one_modality_alone_as_many_stay_as_of_a_random_mask() -> None:
    alone = settings(beside=[], ratio=0.75)
    grid = mask_grid(alone, {"rgb": (14, 14)})
    random = RandomMask(kind="random", view="rgb", ratio=0.75)
    assert grid == (1, 196) and hidden_count(alone, grid, 16) == hidden_count(random, (14, 14), 16) == 147


def test_masks_are_a_function_of_their_key() -> None:
    one, again, other = (draw_dirichlet(1.0, VISIBLE, GRID, keyed(0, 0, i, "mask")) for i in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_views_with_other_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'rgb' has 14 x 14 and 'b' 7 x 7: make it like: rgb"):
        mask_grid(settings(), {"rgb": (14, 14), "a": (14, 14), "b": (7, 7)})
