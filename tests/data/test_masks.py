"""Masks hide what the papers say: exact counts, blocks with inclusive bounds, iBOT's coin."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_ssl.data.masks import hidden_count, make_mask, stratified_shares
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import BlockMask, RandomMask

Mask = Callable[..., RandomMask | BlockMask]


def random_mask(ratio: float, unit: int | None = None) -> RandomMask:
    return RandomMask(kind="random", view="plain", ratio=ratio, unit=unit)


def block_mask(**changes: object) -> BlockMask:
    return BlockMask.model_validate({"kind": "block", "view": "global", **changes})


def draws(
    settings: RandomMask | BlockMask, grid: tuple[int, int] = (14, 14), count: int = 400, stride: int = 16
) -> Tensor:
    return torch.stack([make_mask(settings, grid, stride, keyed(0, 0, i, "mask")) for i in range(count)])


@pytest.mark.parametrize(
    ("ratio", "unit", "grid", "stride", "hidden"),
    [
        (0.75, None, (14, 14), 16, 147),  # MAE: 49 of 196 are kept
        (0.6, 32, (14, 14), 16, 30 * 4),  # SimMIM on ViT-B/16 at 224: 30 of 49 units
        (0.6, 32, (6, 6), 32, 22),  # SimMIM on Swin at 192: 22 of 36
        (0.75, None, (7, 7), 4, 37),
        (0.9, None, (10, 10), 16, 90),
    ],
)
def test_random_mask_hides_the_papers_number(
    ratio: float, unit: int | None, grid: tuple[int, int], stride: int, hidden: int
) -> None:
    settings = random_mask(ratio, unit)
    masks = draws(settings, grid, 20, stride)
    assert masks.dtype == torch.bool and masks.shape == (20, grid[0] * grid[1])
    assert set(masks.sum(1).tolist()) == {hidden} and hidden_count(settings, grid, stride) == hidden
    assert len({tuple(mask.tolist()) for mask in masks}) == 20


def test_random_mask_is_uniform_over_positions() -> None:
    share = draws(random_mask(0.75), count=1000).float().mean(0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 1000)


def test_units_are_whole_squares_in_row_major_order() -> None:
    mask = draws(random_mask(0.6, 32), (4, 6), 1)[0].view(4, 6)
    units = mask.view(2, 2, 3, 2).permute(0, 2, 1, 3).flatten(2)  # [rows, columns, 4 tokens]
    assert ((units.sum(-1) == 0) | (units.sum(-1) == 4)).all() and mask.sum() == 4 * 4


@pytest.mark.parametrize(
    ("target", "minimum", "mean"),
    [(75 / 196, 16, 74.5), (0.3, 16, 57.3), (0.1, 16, 17.6), (0.5, 16, 97.5), (120 / 196, 16, 119.5)],
)
def test_block_masks_come_close_to_their_target_as_the_official_ones(target: float, minimum: int, mean: float) -> None:
    counts = draws(block_mask(ratio=[target, target], min_tokens=minimum)).sum(1).float()
    assert abs(counts.mean().item() - mean) < 0.6 and counts.max() <= round(target * 196)


def test_block_masks_reach_all_edges_alike() -> None:
    share = draws(block_mask(ratio=[0.3, 0.3], min_tokens=16), count=2000).float().mean(0).view(14, 14)
    assert (share - share.flip(0)).abs().max() < 0.06 and (share - share.flip(1)).abs().max() < 0.06
    assert share[-1].mean() > 0.1 and share[:, -1].mean() > 0.1


def test_block_masks_consist_of_few_rectangles() -> None:
    masks = draws(block_mask(ratio=[0.3, 0.3], min_tokens=16)).view(-1, 14, 14).float()
    borders = (masks.diff(dim=1).abs().sum((1, 2)) + masks.diff(dim=2).abs().sum((1, 2))).mean()
    random = draws(random_mask(0.3)).view(-1, 14, 14).float()
    assert borders < 0.55 * (random.diff(dim=1).abs().sum((1, 2)) + random.diff(dim=2).abs().sum((1, 2))).mean()


def test_coin_leaves_half_of_the_crops_whole() -> None:
    masks = draws(block_mask(p=0.5, min_tokens=16), count=1000)
    assert 0.42 < masks.any(1).float().mean() < 0.58
    shares = masks[masks.any(1)].float().mean(1)
    assert shares.min() < 0.15 and shares.max() > 0.45  # uniform in [0.1, 0.5]


def test_stratified_shares_cover_the_range_in_equal_steps() -> None:
    """DINOv2: exactly int(p x crops) crops are masked, one from each of as many equal parts of the range."""
    settings = block_mask(p=0.5, ratio=[0.1, 0.5], stratified=True)
    shares = stratified_shares(settings, 41, keyed(0, 0, 3, "shares"))
    masked = sorted(share for share in shares if share)
    assert len(shares) == 41 and len(masked) == 20
    assert all(0.1 + 0.02 * i <= share <= 0.1 + 0.02 * (i + 1) for i, share in enumerate(masked))
    assert [share for share in shares if share] != masked  # shuffled
    assert stratified_shares(settings, 41, keyed(0, 0, 3, "shares")) == shares
    assert stratified_shares(settings, 41, keyed(0, 0, 4, "shares")) != shares


def test_a_given_share_is_hidden_whatever_the_coin_says() -> None:
    settings = block_mask(p=0.01, min_tokens=4)
    masks = [make_mask(settings, (14, 14), 16, keyed(0, 0, i, "mask"), share=0.4) for i in range(20)]
    assert all(0.36 < mask.float().mean() <= 0.4 for mask in masks)
    assert not make_mask(block_mask(), (14, 14), 16, keyed(0, 0, 0, "mask"), share=0.0).any()


def test_max_tokens_limits_a_block() -> None:
    masks = draws(block_mask(ratio=[0.02, 0.02], min_tokens=2, max_tokens=2), count=50)
    assert masks.sum(1).max() <= 3


def test_inactive_mask_hides_nothing() -> None:
    assert not make_mask(block_mask(), (14, 14), 16, keyed(0, 0, 0, "mask"), active=False).any()


def test_count_of_a_block_mask_is_unknown() -> None:
    assert hidden_count(block_mask(), (14, 14), 16) is None


@pytest.mark.parametrize(
    ("settings", "grid", "stride", "message"),
    [
        (random_mask(0.6, 24), (14, 14), 16, "stride of 16"),
        (random_mask(0.6, 64), (14, 14), 16, "224x224"),
        (random_mask(0.01), (2, 2), 16, None),
        (random_mask(0.9), (2, 2), 16, "4 of 4"),
        (block_mask(unit=48), (7, 7), 32, "stride of 32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    settings: RandomMask | BlockMask, grid: tuple[int, int], stride: int, message: str | None
) -> None:
    if message is None:  # one of four is fine
        assert hidden_count(settings, grid, stride) == 1
        return
    with pytest.raises(ValueError, match=message):
        hidden_count(settings, grid, stride)
