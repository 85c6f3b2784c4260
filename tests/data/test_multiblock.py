"""I-JEPA's masks: counts that never change, blocks that reach every edge, a context that sees no target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybrid_ssl.data.masks import hidden_count
from hybrid_ssl.data.multiblock import Sizes, draw_multiblock, draw_sizes, visible_count
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import MultiBlockMask

GRID = (14, 14)


def settings(**changes: object) -> MultiBlockMask:
    return MultiBlockMask.model_validate({"kind": "multiblock", "view": "plain", **changes})


def draws(mask: MultiBlockMask, count: int, grid: tuple[int, int] = GRID, sizes: Sizes | None = None) -> list[Tensor]:
    """[count, N] hidden from the context, [count, T, N] targets; a step for each unless sizes are given."""
    rows = []
    for i in range(count):
        own = sizes or draw_sizes(mask, grid, keyed(0, 0, i, "sizes"))
        rows.append(draw_multiblock(mask, grid, own, keyed(0, 0, i, "mask")))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def test_context_has_the_same_number_of_tokens_in_every_crop_and_sees_no_target() -> None:
    hidden, targets = draws(settings(), 200)
    assert set((~hidden).sum(1).tolist()) == {49} and hidden_count(settings(), GRID, 16) == 147
    assert not (targets.any(1) & ~hidden).any()


def test_targets_are_rectangles_of_one_size_a_step() -> None:
    mask = settings()
    sizes = draw_sizes(mask, GRID, keyed(0, 0, 7, "sizes"))
    _, targets = draws(mask, 50, sizes=sizes)
    height, width = sizes.target
    assert set(targets.sum(2).flatten().tolist()) == {height * width}
    grid = targets.view(50, 4, *GRID)
    assert set(grid.any(3).sum(2).flatten().tolist()) == {height}
    assert set(grid.any(2).sum(2).flatten().tolist()) == {width}


def test_sizes_follow_the_published_ranges_and_change_from_step_to_step() -> None:
    sizes = [draw_sizes(settings(), GRID, keyed(0, 0, step, "sizes")) for step in range(300)]
    shares = torch.tensor([s.target[0] * s.target[1] / 196 for s in sizes])
    assert 0.12 < shares.min() and shares.max() < 0.24 and 0.16 < shares.mean() < 0.19  # sides are rounded
    aspects = torch.tensor([s.target[0] / s.target[1] for s in sizes])
    assert 0.6 < aspects.min() < 0.9 and 1.3 < aspects.max() < 1.8
    assert {s.context for s in sizes} == {(13, 13), (14, 14)}
    assert abs(torch.corrcoef(torch.stack([shares, aspects]))[0, 1]) < 0.3, "scale and aspect come from one number"


def test_every_row_and_column_is_predicted_and_seen() -> None:
    # with exclusive bounds the last row and column never are
    hidden, targets = draws(settings(), 1000)
    predicted = targets.float().mean((0, 1)).view(GRID)
    seen = (~hidden).float().mean(0).view(GRID)
    for share in (predicted, seen):
        for axis in (0, 1):
            line = share.mean(axis)
            assert (line - line.flip(0)).abs().max() < 0.04
    assert predicted[-1].mean() > 0.02 and seen[-1].mean() > 0.25


def test_a_grid_without_room_for_apart_targets_gets_them_in_one_place() -> None:
    mask = settings(targets=12, visible=0.5)  # twelve apart would leave far less than half
    hidden, targets = draws(mask, 20)
    assert set((~hidden).sum(1).tolist()) == {98}
    assert (targets == targets[:, :1]).all() and not (targets.any(1) & ~hidden).any()


@pytest.mark.parametrize("grid", [(7, 7), (6, 10), (16, 16)])
def test_other_grids_work(grid: tuple[int, int]) -> None:
    hidden, targets = draws(settings(), 30, grid)
    assert set((~hidden).sum(1).tolist()) == {visible_count(settings(), grid)}
    assert targets.shape == (30, 4, grid[0] * grid[1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="grid of 2 x 2 tokens has no room for a context of 1 and targets of up to 3"):
        hidden_count(settings(), (2, 2), 16)
    with pytest.raises(ValueError, match="target_scale must be 0 < low <= high <= 1"):
        settings(target_scale=[0.2, 0.1])
    with pytest.raises(ValueError, match="target_aspect must be 0 < low <= high, got"):
        settings(target_aspect=[0.0, 1.0])
