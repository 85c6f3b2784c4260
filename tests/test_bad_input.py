"""What a user can get wrong: one message, exit code 2, and nothing is left behind; broken images are survived."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hybrid_ssl.checkpoint import checkpoints
from tests.runs import MAE_ENTRY, MOCO_ENTRY, SWIN, pretrain, recipe_data, write_recipe

MAE = {"mae": MAE_ENTRY}
SIMMIM = {"simmim": {"view": "plain", "mask": "random"}}


def pictures(folder: Path, count: int, broken: int = 0) -> Path:
    """`count` gray PNGs, of which the first `broken` are cut off."""
    folder.mkdir(parents=True)
    for number in range(count):
        path = folder / f"{number:03d}.png"
        Image.new("L", (20, 24), number % 256).save(path)
        if number < broken:
            path.write_bytes(path.read_bytes()[:40])
    return folder


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, Any], *words: str) -> str:
    """The one message with which a run is refused."""
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    path = write_recipe(tmp_path, data)
    assert pretrain(path, *words) == 2
    path.unlink()
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "something was left behind"
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("error: ") == 1 and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("run.batch_size=many", "should be an integer, got 'many'"),
        ("optimizer.lr=.nan", "finite number"),
        ("optimizer.lr=1e30", "less than or equal to 100"),
        ("run.length=1e99 epochs", "too long for a duration"),
        ("run.length=0 steps", "less than one step"),
        ("run.batch_size=1000", "batch_size 1000 is more than the 64 images of the data: lower it"),
        ("run.micro_batch=3", "does not divide by run.micro_batch 3"),
        ("views.plain.size=18", "no multiple of 4 pixels.*nearest sizes: 16, 20"),
        ("views.plain.size=1000000", "size"),
        ("views.plain.crops=1000000", "crops"),
        ("data.source=/no/such/folder", "/no/such/folder"),
        ("data.source=embedded:mnist", "embedded:mnist"),
        ("data.mean=[0.1, 0.2]", "mean"),
        ("data.std=[0.0]", "std"),
        ("encoder.name=vit_tinny_patch16_224", "no model 'vit_tinny_patch16_224'; similar: vit_tiny"),
        ("encoder.args.embed_dims=3", "embed_dims"),
        ("encoder.args.num_heads=5", "timm cannot build"),
        ("encoder.args.drop_rate=0.1", "dropout rates must be 0"),
        ("encoder.init=/no/such/export", "/no/such/export"),
        ("objectives={simclrr: {}}", "no objective named 'simclrr'"),
        ("objectives.mae.view=nope", "'nope'"),
        ("objectives.mae.mask=nope", "no mask 'nope'; masks of the recipe: block, random"),
        ("objectives.mae.view=global", "mask 'random' is for view 'plain', but an objective uses it on 'global'"),
        ("objectives.mae.mask=block objectives.mae.view=global", "use kind: random"),
        ("objectives.moco_v3.view=plain", "set views.plain.crops to 2"),
        ("masks.random.view=nope", "mask 'random' is for view 'nope'; views are: global, local, plain"),
        ("masks.random.unit=6", "unit"),
        ("masks.random.ratio=0.99", "ratio"),
        ("run.precision=fp16", "fp16 needs a GPU"),
        ("run.trackers=[wandbb]", "'tensorboard', 'wandb', 'trackio' or 'mlflow'"),
        ("data.probe={label: nothing}", "nothing"),
        ("export.which=teacher objectives={mae: {decoder_dim: 16, decoder_heads: 2}}", "no objective of this recipe"),
        ("run.out=", "run.out: should be a string"),
        ("lr", "no override: write key.path=value"),
    ],
)  # fmt: skip
def test_wrong_recipe_is_refused_in_one_message(
    override: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = override.split(" objectives") if " objectives" in override else [override]
    changes = [changes[0], *("objectives" + change for change in changes[1:])]
    message = refused(tmp_path, capsys, recipe_data(tmp_path / "run"), *changes)
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("objectives", "sections", "words"),
    [
        (MAE, {"encoder": SWIN}, "cannot be dropped; use a ViT, or an objective that replaces them"),
        (SIMMIM, {"encoder": {"name": "resnet10t", "args": {}}}, "ResNet takes no mask token: use a timm ViT, Swin"),
        (SIMMIM, {"encoder": SWIN | {"args": SWIN["args"] | {"window_size": 3}}}, "no multiple of its 3 x 3 window"),
        ({"moco_v3": MOCO_ENTRY}, {"run": {"batch_size": 1}}, "BatchNorm over one image gives zeros"),
    ],
)  # fmt: skip
def test_encoder_that_cannot_serve_the_objective_is_refused(
    objectives: dict[str, Any], sections: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(tmp_path, capsys, recipe_data(tmp_path / "run", objectives, **sections))


def test_tracker_that_is_not_installed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid_ssl.monitor.trackers.PACKAGES", {"wandb": "no_such_package"})
    message = refused(tmp_path, capsys, recipe_data(tmp_path / "run", MAE), "run.trackers=[wandb]")
    assert "no_such_package is not installed: pip install no_such_package, or leave it out" in message


def folder_data(out: Path, source: Path, **data: Any) -> dict[str, Any]:
    return recipe_data(out, MAE, data={"source": str(source), "limit": None} | data, run={"length": "1 epochs"})


def test_folder_without_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    assert "empty" in refused(tmp_path, capsys, folder_data(tmp_path / "run", tmp_path / "empty"))


def test_probe_without_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "images", 16)
    message = refused(tmp_path, capsys, folder_data(tmp_path / "run", source, probe={}))
    assert "needs labels" in message and "data.probe.source" in message


def test_objective_without_its_labels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recipe_data(tmp_path / "run", {"supcon": {"hidden": 32, "dim": 16}})
    data["data"] |= {"source": str(pictures(tmp_path / "images", 12)), "limit": None}
    refused(tmp_path, capsys, data, "objectives.supcon", "needs labels", "data.label")


def test_folder_of_nothing_but_broken_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pictures(tmp_path / "images", 16, broken=16)
    assert "none of the images can be read" in refused(tmp_path, capsys, folder_data(tmp_path / "run", source))


def test_output_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    message = refused(tmp_path, capsys, recipe_data(out, MAE))
    assert "is in use, it holds other files" in message and (out / "thesis.tex").read_text() == "mine"
    assert "holds no checkpoint" in refused(tmp_path, capsys, recipe_data(out, MAE), "--resume")
    (tmp_path / "file").write_text("")
    assert "is a file: choose a folder" in refused(tmp_path, capsys, recipe_data(tmp_path / "file", MAE))


def test_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another `run.out`" in refused(tmp_path, capsys, recipe_data(tmp_path / "file" / "run", MAE))


def test_second_start_says_how_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    path = write_recipe(tmp_path, recipe_data(out, MAE, run={"length": "1 steps"}))
    assert pretrain(path) == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert pretrain(path) == 2
    assert "a run at step-00000001: add --resume to continue" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_missing_and_broken_recipe_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "nope.yaml") == 2
    assert "cannot read the recipe" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("run: {length: [\n")
    assert pretrain(tmp_path / "broken.yaml") == 2
    assert "not valid YAML" in capsys.readouterr().err


# broken images


def test_broken_image_is_named_once_counted_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = pictures(tmp_path / "images", 32, broken=1), tmp_path / "run"
    data = folder_data(out, source, max_broken=0.05) | {}
    assert pretrain(write_recipe(tmp_path, data), "run.length=3 epochs", "run.workers=2") == 0
    said = capsys.readouterr().out
    assert said.count("broken image, replaced: ") == 1 and "000.png" in said
    rows = [json.loads(line) for line in (out / "bad_files.jsonl").read_text().splitlines()]
    assert [Path(row["name"]).name for row in rows] == ["000.png"]


def test_too_many_broken_images_stop_the_run_after_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = pictures(tmp_path / "images", 64, broken=4), tmp_path / "run"
    assert pretrain(write_recipe(tmp_path, folder_data(out, source))) == 2
    message = capsys.readouterr().err
    assert "of 64 images are broken, more than data.max_broken=0.01" in message and ".png" in message
    saved = checkpoints(out / "checkpoints")
    assert saved and (out / "bad_files.jsonl").is_file()
    assert pretrain(tmp_path / "recipe.yaml", "data.max_broken=0.5", "--resume") == 0
    assert f"continuing at step {int(saved[0].name[5:])} of 8" in capsys.readouterr().out
