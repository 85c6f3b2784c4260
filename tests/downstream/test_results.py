"""Tables put results side by side that differ in weights and seed alone, and say what keeps others apart."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
from PIL import Image

from hybrid_ssl.cli import main
from hybrid_ssl.downstream.results import Encoded, write_results
from hybrid_ssl.downstream.tables import Number, Table, as_json, as_markdown, build_table, gather, number_text

FACTS = {"fingerprint": "abc", "classes": 3, "images": {"train": 60, "test": 12}, "problems": []}


def add(folder: Path, top1: float, *, weights: str = "runs/vit", seed: int = 0, **more: Any) -> None:
    """One result; `weights`: random, public, or a folder's name."""
    about: dict[str, Any] = {"task": "classification", "metric": "top1", "data": FACTS, "steps": 100, "batch_size": 32}
    about |= {"settings": {"run": {"seed": seed, "workers": seed}, "optimizer": {"lr": 1e-3}}} | more
    name, random, public = ("vit", weights == "random", weights == "public") if "/" not in weights else (weights, 0, 0)
    encoder = Encoded(name, about.pop("architecture", "vit_tiny"), bool(random), 1_200_000, bool(public))
    metrics = {"top1": top1, "mean_class": top1 / 2, "class/cat": 1.0}
    write_results(folder, metrics=metrics, encoder=encoder, seed=seed, seconds=1.0, hardware="1 CPU process", **about)


def table(root: Path) -> Table:
    return build_table(gather([root]))


def test_means_and_spreads_are_over_seeds(tmp_path: Path) -> None:
    for seed, (trained, random) in enumerate([(0.80, 0.50), (0.90, 0.56), (0.85, 0.50)]):
        add(tmp_path / f"p{seed}", trained, seed=seed)
        add(tmp_path / "deep" / f"r{seed}", random, seed=seed, weights="random")
    add(tmp_path / "public", 0.95, weights="public")
    found = table(tmp_path)
    (row,) = found.rows
    assert list(row.cells) == [("random", ""), ("pretrained", "runs/vit"), ("public", "vit")]
    assert row.cells["pretrained", "runs/vit"]["top1"] == pytest.approx((0.85, stdev([0.8, 0.9, 0.85]), 3))
    assert row.cells["random", ""]["top1"].mean == pytest.approx(0.52)
    assert row.cells["public", "vit"]["top1"] == Number(0.95, None, 1)
    assert found.remarks == [
        "classification, vit_tiny: not the same seeds: random [0, 1, 2]; pretrained runs/vit [0, 1, 2]; public vit [0]"
    ]
    text = as_markdown(found)
    assert "| **top1** | **0.520 ± 0.035 (3)** | **0.850 ± 0.050 (3)** | **0.950 (1)** |" in text
    assert "class/cat" not in text and "mean_class" in text and "train 60, test 12" in text
    columns = as_json(found)["rows"][0]["columns"]
    assert columns[1]["metrics"]["class/cat"] == {"mean": 1.0, "spread": 0.0, "seeds": 3}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": FACTS | {"fingerprint": "xyz"}}, "data: abc / xyz"),
        ({"steps": 200}, "steps: 100 / 200"),
        ({"batch_size": 64}, "batch_size: 32 / 64"),
        ({"settings": {"optimizer": {"lr": 0.01}}}, "optimizer.lr: 0.001 / 0.01"),
    ],
)
def test_other_data_and_budgets_get_rows_of_their_own_and_a_remark(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    add(tmp_path / "a", 0.8)
    add(tmp_path / "b", 0.5, weights="random", **change)
    found = table(tmp_path)
    assert [len(row.cells) for row in found.rows] == [1, 1]
    assert found.remarks == [f"classification, vit_tiny: 2 rows that must not be compared, they differ in {told}"]
    assert told in as_markdown(found)


def test_architectures_and_tasks_are_rows_without_a_remark(tmp_path: Path) -> None:
    add(tmp_path / "a", 0.8)
    add(tmp_path / "b", 0.7, architecture="swin_tiny")
    add(tmp_path / "c", 0.3, task="knn")
    found = table(tmp_path)
    assert [(row.task, row.about["encoder"].split(",")[0]) for row in found.rows] == [
        ("classification", "swin_tiny"),
        ("classification", "vit_tiny"),
        ("knn", "vit_tiny"),
    ]
    assert not found.remarks


def test_a_repeated_seed_and_problems_of_the_data_are_told(tmp_path: Path) -> None:
    add(tmp_path / "a", 0.8, data=FACTS | {"problems": ["2 images without label are left out"]})
    add(tmp_path / "b", 0.7, data=FACTS | {"problems": ["2 images without label are left out"]})
    found = table(tmp_path)
    assert found.rows[0].cells["pretrained", "runs/vit"]["top1"].seeds == 1
    assert any("seed 0 is there twice, the newer one counts" in remark for remark in found.remarks)
    assert any("2 images without label" in remark for remark in found.remarks)


def test_numbers_are_written_with_their_spread() -> None:
    assert number_text(Number(0.5, 0.0123, 2)) == "0.500 ± 0.012 (2)"
    assert number_text(Number(0.5, None, 1)) == "0.500 (1)" and number_text(None) == ""


def test_command_writes_markdown_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path / "in" / "a", 0.8)
    add(tmp_path / "in" / "b", 0.4, weights="random", steps=50)
    for _ in range(2):  # an earlier table is replaced
        assert main(["results", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "must not be compared" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "table.png") as picture:
        assert picture.width > 500 and len(picture.getcolors(1 << 20) or []) > 20
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert "# Results" in (tmp_path / "out" / "table.md").read_text()


def test_what_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["results", str(tmp_path), "--out", out]) == 2
    assert "there is no results.json below" in capsys.readouterr().err
    assert main(["results", str(tmp_path / "nowhere"), "--out", out]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"task": 1}')
    assert main(["results", str(tmp_path), "--out", out]) == 2
    assert "results.json is no result of this library: data, encoder" in capsys.readouterr().err
    (tmp_path / "results.json").unlink()
    add(tmp_path / "a", 0.5)
    assert main(["results", str(tmp_path / "a"), "--out", str(tmp_path / "a")]) == 2
    assert "holds other files" in capsys.readouterr().err
