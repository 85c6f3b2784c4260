"""Sheets and curves show what they say: right pixels at the right place, the right lines, readable scales."""

import json

import numpy as np
import pytest
import torch

from hybrid_ssl.monitor.curves import curves, panels_of, smooth, thin, ticks
from hybrid_ssl.monitor.pictures import (
    Column,
    cover_patches,
    pixels_of,
    reconstruction_sheet,
    sheet,
    view_sheet,
)

RED, GREEN, BLUE = (
    torch.tensor(c, dtype=torch.uint8).view(1, 3, 1, 1) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255])
)


def flat(colour, n, side):
    return colour.expand(n, 3, side, side)


def colours(image):
    return {tuple(int(v) for v in c) for c in np.asarray(image).reshape(-1, 3)}


def area(image, colour):
    return int((np.asarray(image) == colour.view(3).numpy()).all(-1).sum())


def test_mask_of_patches_becomes_one_of_pixels():
    mask = torch.tensor([[True, False, False, False, False, True]])
    assert pixels_of(mask, (2, 3), (4, 6))[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    with pytest.raises(ValueError, match="6 patches does not fit a grid of 7 x 7"):
        pixels_of(mask, (7, 7), (28, 28))


def test_every_crop_and_mask_has_its_column():
    views = {"global": torch.cat([flat(RED, 3, 16), flat(GREEN, 3, 16)]), "local": flat(BLUE, 3, 8)}
    masks = {"blocks": torch.zeros(6, 4, dtype=torch.bool)}
    page = view_sheet(views, {"global": 2, "local": 1}, masks, {"blocks": "global"}, {"global": (2, 2)}, cell=64)
    # 3 images: each global crop is shown plain and under its mask, the local one at half the side
    assert area(page, RED) == area(page, GREEN) == 3 * 2 * 64 * 64
    assert area(page, BLUE) == 3 * 32 * 32


def test_hidden_patches_are_covered_and_only_those():
    mask = torch.tensor([[True, False, False, True]])
    covered = cover_patches(flat(RED, 1, 8), mask, {"v": (2, 2)}, "v")
    hidden = (covered != flat(RED, 1, 8)).any(1)[0]
    assert torch.equal(hidden, pixels_of(mask, (2, 2), (8, 8))[0, 0])
    with pytest.raises(ValueError, match="patch grid of view 'w'"):
        cover_patches(flat(RED, 1, 8), mask, {"v": (2, 2)}, "w")


def test_no_more_images_than_asked_for():
    few = view_sheet({"v": flat(RED, 9, 16)}, {"v": 1}, images=2, cell=32)
    assert area(few, RED) == 2 * 32 * 32


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_drawn(channels):
    pictures = torch.full((2, channels, 8, 8), 90, dtype=torch.uint8)
    page = view_sheet({"v": pictures}, {"v": 1}, cell=16)
    assert area(page, torch.tensor([90, 90, 90])) >= 2 * 16 * 16


def test_filling_in_takes_hidden_patches_from_the_prediction():
    mask = torch.tensor([[True, False, False, False]] * 6)
    page = reconstruction_sheet(flat(RED, 6, 8), mask, flat(GREEN, 6, 8).float() / 255, (2, 2), cell=32)
    whole = 6 * 32 * 32
    assert area(page, RED) == whole + whole * 3 // 4 + whole * 3 // 4  # original, seen, filled in
    assert area(page, GREEN) == whole + whole // 4  # predicted, filled in


def test_float_pictures_and_empty_sheets_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        sheet([Column("a", "", torch.zeros(1, 3, 8, 8))], 1, 16)
    with pytest.raises(ValueError, match="no views"):
        view_sheet({}, {})


def metrics(tmp_path, rows):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(steps):
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 2.0 / step, "mae/loss": 1.0 / step, "dino/loss": 5.0, "dino/kl": 1.0, "lr": 1e-3}
        if step % 5 == 0:
            row |= {"probe/teacher/knn": step / steps, "probe/student/knn": 0.5, "probe/raw_pixels/knn": 0.8125}
            row |= {"probe/teacher/std": 0.5}
        yield row


def test_panels_are_losses_probe_accuracy_and_statistics():
    panels = panels_of(run(20))
    assert [p.title for p in panels] == [
        "loss (weighted sum)",
        "mae loss",
        "dino loss",
        "k-NN accuracy",
        "feature std (1 = isotropic)",
    ]
    knn = panels[3]
    assert list(knn.lines) == ["student", "teacher"] and knn.levels == {"raw pixels": 0.8125}
    assert knn.lines["teacher"] == [(5, 0.25), (10, 0.5), (15, 0.75), (20, 1.0)]


def test_a_single_objective_has_one_loss_panel():
    assert [p.title for p in panels_of([{"step": 1, "loss": 1.0, "mae/loss": 1.0}])] == ["mae loss"]


@pytest.mark.parametrize("steps", [5, 300])
def test_curves_are_drawn_from_a_metrics_file(tmp_path, steps):
    page = curves(metrics(tmp_path, run(steps)))
    assert page.size == (3 * 380, 2 * 260)
    assert (11, 111, 184) in colours(page) and (209, 102, 26) in colours(page)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 7, "loss": 0.0}],
        [{"step": s, "loss": -3.0} for s in range(1, 4)],
        [{"step": 1, "loss": None}, {"step": 2, "loss": 1e-9}, {"step": 3, "loss": 1e12}],
    ],
)
def test_odd_runs_are_drawn_too(tmp_path, rows):
    assert curves(metrics(tmp_path, rows)).size == (380, 260)


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(ValueError, match="no losses or probe results yet: 1 lines"):
        curves(metrics(tmp_path, [{"step": 1, "lr": 0.1}]))


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.88, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (0, 3000, [0, 500, 1000, 1500, 2000, 2500, 3000]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_ticks_of_a_constant_surround_it():
    assert ticks(4.0, 4.0)[0] <= 4.0 < ticks(4.0, 4.0)[-1]


def test_smoothing_has_no_lag_and_forgets_a_spike():
    line = [(float(x), float(x)) for x in range(200)]
    assert smooth(line)[100] == pytest.approx((100, 100))
    line[100] = (100.0, 1e6)
    assert smooth(line)[100][1] == pytest.approx(100, abs=1)
    assert thin(line, 50)[10] == (41.5, 41.5) and len(thin(line, 50)) == 50
