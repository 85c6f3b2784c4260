"""Corrupted views: where, how much, from which donor, and the same bits with any workers and processes."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from hybrid_ssl.data.corrupt import corrupt, draw_rectangles
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import CorruptSettings, DataSettings, JitterSettings, ViewSettings
from hybrid_ssl.data.sources import Images, open_named
from hybrid_ssl.plan import Batch

COUNT = 12


def picture(seed: int, v: int = 2, side: int = 32) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (v, 3, side, side), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize(("align", "share"), [(1, 0.5), (8, 0.5), (1, 0.3), (16, 0.3)])
def test_rectangles_reach_the_share_and_overshoot_by_one_at_most(align: int, share: float) -> None:
    settings = CorruptSettings(align=align)
    drawn = torch.stack([draw_rectangles((64, 96), share, settings, keyed(0, 0, i, "c")) for i in range(60)])
    shares = drawn.float().mean((1, 2))
    assert shares.min() >= share and shares.max() < share + 0.3**2 + 0.01
    assert len({each.numpy().tobytes() for each in drawn}) > 55
    coarse = drawn.unflatten(1, (-1, align)).unflatten(3, (-1, align)).float().mean((2, 4))
    assert coarse.unique().tolist() == [0, 1]  # whole cells of the grid
    assert drawn[:, -1].any() and drawn[:, :, -1].any(), "the last row and column, too"


def test_paint_is_the_mean_colour_or_the_one_that_was_given() -> None:
    crops = picture(0)
    for fill, colour in ((None, crops[0].float().mean((1, 2)).round()), ([1, 2, 3], torch.tensor([1.0, 2, 3]))):
        out, where = corrupt(crops, None, CorruptSettings(fill=fill), keyed(0, 0, 0, "c"))
        mask = where.unflatten(1, (32, 32))
        assert torch.equal(out[:, :, :][0][:, ~mask[0]], crops[0][:, ~mask[0]])
        assert (out[0][:, mask[0]].float() == colour[:, None]).all()
    assert not torch.equal(where[0], where[1])  # each crop by itself
    with pytest.raises(ValueError, match="corrupt.fill has 1 values for images of 3 channels"):
        corrupt(crops, None, CorruptSettings(fill=[0]), keyed(0, 0, 0, "c"))


def test_donor_gives_the_same_place_and_counts_where_it_is_equal() -> None:
    crops, settings = picture(0), CorruptSettings()
    out, where = corrupt(crops, picture(1), settings, keyed(0, 0, 0, "c"))
    mask = where.unflatten(1, (1, 32, 32))
    assert torch.equal(out, torch.where(mask, picture(1), crops)) and 0.3 <= where.float().mean() < 0.4
    same, again = corrupt(crops, crops, settings, keyed(0, 0, 0, "c"))
    assert torch.equal(same, crops) and torch.equal(again, where)


VIEWS = {
    "global": ViewSettings(size=32, crops=2, scale=[0.6, 1.0], jitter=JitterSettings(), blur=[1.0, 0.1]),
    "corrupted": ViewSettings(size=32, crops=2, like="global", corrupt=CorruptSettings(replace=0.5)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Images:
    root = tmp_path_factory.mktemp("images")
    for i in range(COUNT):
        Image.fromarray(picture(i, 1, 40)[0].permute(1, 2, 0).numpy()).save(root / f"{i:02}.png")
    return open_named(str(root))


def batches(
    source: Images, count: int = 3, views: dict[str, ViewSettings] | None = None, **changes: Any
) -> list[Batch]:
    options: dict[str, Any] = {"masks": {}, "grids": {"global": (4, 4), "corrupted": (4, 4)}, "stride": 8}
    loader = Loader(source, DataSettings(source="-"), views or VIEWS, **(options | {"batch_size": 4} | changes))
    return list(islice(loader.iterate(), count))


def numbers(batch: Batch) -> list[int]:
    assert batch.ids is not None
    return [int(i) for i in batch.ids]


def test_batch_has_clean_and_corrupted_crops_and_says_where_they_differ(source: Images) -> None:
    for batch in batches(source):
        clean, corrupted = batch.views["global"], batch.views["corrupted"]
        where = batch.masks["corrupted.pixels"].view(8, 1, 32, 32)
        assert where.dtype == torch.bool and batch.hidden == {}
        assert torch.equal(torch.where(where, clean, corrupted), clean)
        assert ((clean != corrupted).any(1, keepdim=True) <= where).all()
        assert (((clean != corrupted).any(1, keepdim=True) & where).sum() / where.sum()) > 0.9


def test_donor_is_another_image_as_it_looks_in_this_epoch(source: Images) -> None:
    views = {**VIEWS, "corrupted": VIEWS["corrupted"].model_copy(update={"corrupt": CorruptSettings(replace=1.0)})}
    epoch = batches(source, 3, views)
    clean = {i: b.views["global"].unflatten(0, (2, 4))[:, k] for b in epoch for k, i in enumerate(numbers(b))}
    found = set()
    for batch in epoch:
        for k, i in enumerate(numbers(batch)):
            out = batch.views["corrupted"].unflatten(0, (2, 4))[:, k]
            where = batch.masks["corrupted.pixels"].unflatten(0, (2, 4))[:, k].view(2, 1, 32, 32)
            donors = [j for j, crops in clean.items() if torch.equal(torch.where(where, crops, clean[i]), out)]
            assert len(donors) == 1 and donors[0] != i
            found.add((i, donors[0]))
    assert len(found) == COUNT and len({j for _, j in found}) > 4


def test_same_bits_with_any_workers_and_processes(source: Images) -> None:
    alone = batches(source)
    for one, two in zip(alone, batches(source, workers=2), strict=True):
        assert all(torch.equal(one.views[name], two.views[name]) for name in one.views)
        assert torch.equal(one.masks["corrupted.pixels"], two.masks["corrupted.pixels"])
    parts = [batches(source, rank=rank, world=2) for rank in range(2)]
    unstack: Callable[[Tensor], Tensor] = lambda x: x.unflatten(0, (2, -1))  # noqa: E731
    for whole, left, right in zip(alone, *parts, strict=True):
        for pick in (lambda b: b.views["corrupted"], lambda b: b.masks["corrupted.pixels"]):
            assert torch.equal(torch.cat([unstack(pick(left)), unstack(pick(right))], 1), unstack(pick(whole)))


def test_broken_donors_are_replaced(source: Images, tmp_path: Path) -> None:
    for i in range(COUNT):
        (tmp_path / f"{i:02}.png").write_bytes(b"" if i % 2 else Path(source.name(i)).read_bytes())
    broken = open_named(str(tmp_path))
    loader = Loader(
        broken, DataSettings(source="-", max_broken=1.0), VIEWS, {}, grids={"global": (4, 4)}, stride=8, batch_size=4
    )
    assert next(iter(loader.iterate())).views["corrupted"].shape == (8, 3, 32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corrupt": {}}, "name that view in `like`"),
        ({"like": "global", "size": 30, "corrupt": {"align": 4}}, "corrupt.align 4 has to divide the sides 30"),
        ({"like": "global", "size": 32, "corrupt": {"align": 16}}, "at most corrupt.largest 0.3 x 32 pixels"),
    ],
)
def test_what_does_not_fit_is_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewSettings.model_validate(settings)
