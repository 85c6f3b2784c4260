"""Views that are made for one objective: turned, shifted, pasted, corrupted."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hybrid_ssl.data.cutpaste import plant, turn
from hybrid_ssl.data.order import keyed
from hybrid_ssl.data.settings import ViewSettings
from hybrid_ssl.data.views import Views


def picture(height: int = 60, width: int = 80, channels: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=draw, dtype=torch.uint8)


def test_turned_crops_are_one_square_turned_exactly() -> None:
    view = ViewSettings(size=32, crops=4, turns=True, scale=[0.1, 1.0])
    seen = set()
    for i in range(5):
        crops = Views({"turned": view})(picture(), 0, 0, i)["turned"]
        assert all(torch.equal(crops[k], crops[0].rot90(k, (1, 2))) for k in range(4))
        seen.add(crops[0].numpy().tobytes())
    assert len(seen) == 5
    upright = ViewSettings(size=32, scale=[0.1, 1.0])
    assert torch.equal(Views({"turned": upright})(picture(), 0, 0, 4)["turned"][0], crops[0])


@pytest.mark.parametrize("wrong", [{"crops": 5}, {"size": [32, 40]}, {"vflip": 0.5}])
def test_turns_of_anything_but_squares_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="up to 4 crops of a square"):
        ViewSettings.model_validate({"turns": True, "crops": 4, **wrong})


def changed_box(picture: Tensor, kind: str, i: int) -> tuple[int, int, int]:
    """Rows, columns of the box around what a defect changed, and the number of changed pixels."""
    planted = plant(kind, picture, keyed(0, 0, i, "defect"), "fast")  # type: ignore[arg-type]
    changed = (planted != picture).any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1, int(changed.sum())


def test_patches_are_rectangles_of_the_papers_size_half_of_them_wide() -> None:
    image = picture(128, 128)
    boxes = [changed_box(image, "patch", i) for i in range(300)]
    areas = [rows * columns / 128**2 for rows, columns, _ in boxes]
    aspects = [columns / rows for rows, columns, _ in boxes]
    assert 0.017 < min(areas) < 0.03 and 0.14 < max(areas) < 0.16
    assert sum(areas) / 300 == pytest.approx(0.085, abs=0.01)
    assert all(0.27 < aspect < 3.6 for aspect in aspects)
    assert sum(aspect > 1 for aspect in aspects) == pytest.approx(150, abs=45)  # a uniform draw makes 230 of them wide
    assert all(count > 0.97 * rows * columns for rows, columns, count in boxes)  # filled, save pixels equal by chance


def test_scars_are_thin_turned_and_grow_with_the_picture() -> None:
    for side in (64, 256):
        boxes = [changed_box(picture(side, side), "scar", i) for i in range(200)]
        areas = [count * (256 / side) ** 2 for _, _, count in boxes]
        assert 8 < min(areas) and max(areas) < 1.3 * 16 * 25
        assert max(max(rows, columns) for rows, columns, _ in boxes) <= side / 256 * math.hypot(16, 25) + 3
        turned = sum(count < 0.8 * rows * columns for rows, columns, count in boxes)
        assert turned > 100  # an upright rectangle fills its box


def test_turning_a_piece_keeps_its_pixels() -> None:
    piece = picture(6, 10)
    same, where = turn(piece, 0.0)
    assert torch.equal(same, piece) and where.all()
    quarter, where = turn(piece, 90.0)
    assert where.all() and (
        torch.equal(quarter, piece.rot90(1, (1, 2))) or torch.equal(quarter, piece.rot90(-1, (1, 2)))
    )
    _, where = turn(picture(20, 4), 45.0)
    assert where.sum() == pytest.approx(80, rel=0.1)


def test_pasted_crops_are_one_crop_with_different_defects() -> None:
    kinds = ViewSettings(size=32, crops=3, cutpaste=["none", "patch", "scar"])
    none, patch, scar = Views({"pasted": kinds})(picture(), 0, 0, 3)["pasted"]
    assert torch.equal(none, Views({"pasted": ViewSettings(size=32)})(picture(), 0, 0, 3)["pasted"][0])
    assert 0 < (scar != none).any(0).sum() < (patch != none).any(0).sum() < 32 * 32 / 4
    again = Views({"pasted": kinds})(picture(), 0, 0, 3)["pasted"]
    assert torch.equal(again, torch.stack([none, patch, scar]))
    with pytest.raises(ValidationError, match="a different defect for each of 2 crops"):
        ViewSettings(crops=2, cutpaste=["none", "patch", "scar"])


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("channels", [1, 5])
def test_defects_fit_small_pictures_of_any_channels(side: int, channels: int) -> None:
    for kind in ("patch", "scar"):
        planted = [plant(kind, picture(side, side, channels), keyed(0, 0, i, "d"), "fast") for i in range(50)]
        assert all(p.shape == (channels, side, side) for p in planted)
        assert len({p.numpy().tobytes() for p in planted}) > 25


def test_shifted_windows_come_from_one_larger_crop() -> None:
    views = Views(
        {
            "online": ViewSettings(size=24, shift=8, scale=[0.5, 1.0]),
            "target": ViewSettings(size=24, shift=8, like="online"),
        }
    )
    offsets = set()
    for i in range(150):
        drawn = views(picture(), 0, 0, i)
        online, target = drawn["online"][0], drawn["target"][0]
        fits = [
            (y, x) for y in range(8) for x in range(8) if torch.equal(target[:, : 24 - y, : 24 - x], online[:, y:, x:])
        ]
        assert len(fits) == 1, "the target is a window further down and to the right"
        offsets |= set(fits)
    assert {y for y, _ in offsets} == set(range(8)) == {x for _, x in offsets}  # 0 .. shift - 1, as released


def test_unshifted_partner_is_the_top_left_window_of_the_crop() -> None:
    image = picture()
    online = Views({"a": ViewSettings(size=24, shift=8, scale=[0.5, 1.0])})(image, 0, 0, 1)["a"]
    whole = Views({"a": ViewSettings(size=32, scale=[0.5, 1.0])})(image, 0, 0, 1)["a"]
    assert torch.equal(online, whole[:, :, :24, :24])


def test_partners_with_different_shifts_are_refused() -> None:
    with pytest.raises(ValueError, match="'target' has shift 0, 'online' has 8"):
        Views({"online": ViewSettings(shift=8), "target": ViewSettings(like="online")})
