"""Any checkpoint of a run gives its teacher or student, with the facts that the run knew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from hybrid_ssl import checkpoint
from hybrid_ssl.config import build_recipe
from hybrid_ssl.encoder import build_encoder
from hybrid_ssl.hub.from_run import export_place, export_run, recipe_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two checkpoints; at step 2 student weights are 2 and teacher weights are 12."""
    recipe = build_recipe(
        {
            "run": {"length": "10 steps", "batch_size": 8, "out": str(tmp_path)},
            "encoder": {
                "name": "vit_tiny_patch16_224",
                "args": {"depth": 1, "embed_dim": 48, "num_heads": 3, "reg_tokens": 2},
            },
            "data": {"source": "embedded:fashion_mnist", "channels": 1},
            "views": {"plain": {"size": 32}, "large": {"size": 64}},
            "masks": {"random": {"kind": "random", "view": "plain", "ratio": 0.75}},
            "objectives": {"mae": {}},
            "optimizer": {"lr": 1e-3},
            "export": {"licence": "cc0-1.0"},
        }
    )
    encoder = build_encoder(recipe.encoder, in_chans=1, sizes={"plain": (32, 32), "large": (64, 64)})
    for step in (1, 2):
        state = {
            "recipe": recipe.model_dump(mode="json"),
            "step": step,
            "steps_per_epoch": 4,
            "seconds": 60.0,
            "images": 12_000,
            "hardware": "2 CPU cores",
            "timm": recipe_of(encoder.model),
            "mean_std": [[0.25], [0.5]],
            "outcome": {"raw pixels": 0.8, "teacher": 0.9, "student": 0.85},
        }
        tensors = {
            f"model.{net}.model.{name}": torch.full_like(value, step + plus)
            for net, plus in (("student", 0.0), ("teacher", 10.0))
            for name, value in encoder.model.state_dict().items()
        }
        tensors |= {"model.objectives.mae.decoder.w": torch.ones(3), "model.student.mask_token": torch.ones(1, 1, 48)}
        checkpoint.save(tmp_path / "run" / "checkpoints", step, tensors, state, keep=2)
    return tmp_path / "run"


@pytest.mark.parametrize(("network", "value"), [(None, 12.0), ("auto", 12.0), ("teacher", 12.0), ("student", 2.0)])
def test_latest_checkpoint_gives_the_network_asked_for(run: Path, network: str | None, value: float) -> None:
    folder = export_run(run, run / "encoder", network=network, verify=False).folder  # type: ignore[arg-type]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(bool((p == value).all()) for p in loaded.parameters()) and loaded.num_reg_tokens == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 64, 64] and config["pretrained_cfg"]["license"] == "cc0-1.0"
    which = "student" if network == "student" else "teacher"
    assert config["ssl"]["network"] == which and config["ssl"]["steps"] == 2 and config["ssl"]["epochs"] == 0.5
    assert config["ssl"]["probe"]["k-NN top-1"] == {
        "this encoder": {"teacher": 0.9, "student": 0.85}[which],
        "raw pixels": 0.8,
    }
    assert config["ssl"]["images"] == 12_000 and config["ssl"]["hardware"] == "2 CPU cores"
    assert checkpoint.load(run / "checkpoints" / "step-00000002")  # a run is never changed by an export


def test_a_single_checkpoint_can_be_exported(run: Path, tmp_path: Path) -> None:
    folder = export_run(run / "checkpoints" / "step-00000001", tmp_path / "out", licence="mit", verify=False).folder
    assert "license: mit" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["ssl"]["steps"] == 1


def test_what_is_not_there_is_explained(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_run(tmp_path, tmp_path / "out")
    tensors, state = checkpoint.load(run / "checkpoints" / "step-00000002")
    students = {name: t for name, t in tensors.items() if ".teacher." not in name}
    checkpoint.save(run / "checkpoints", 3, students, state, keep=2)
    with pytest.raises(ValueError, match="no teacher encoder; there is: student"):
        export_run(run, tmp_path / "out", network="teacher")
    assert not (tmp_path / "out").exists()


def test_weights_that_a_run_started_from_may_be_gone(run: Path, tmp_path: Path) -> None:
    tensors, state = checkpoint.load(run / "checkpoints" / "step-00000002")
    state["recipe"]["encoder"]["init"] = str(tmp_path / "moved away")
    checkpoint.save(run / "checkpoints", 3, tensors, state, keep=2)
    folder = export_run(run, tmp_path / "out", verify=False).folder
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_reg_tokens == 2
    assert "moved away" not in (folder / "config.json").read_text() + (folder / "README.md").read_text()


def test_exporting_an_export_copies_it(run: Path, tmp_path: Path) -> None:
    first = export_place(run, tmp_path / "first", verify=False).folder
    second = export_place(first, tmp_path / "second", verify=False).folder
    again = export_place(second, second, verify=False).folder
    contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (first, second, again)]
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 4
    with pytest.raises(ValueError, match="is an export already, with its network and licence"):
        export_place(first, tmp_path / "third", licence="mit")


def test_only_exports_are_replaced(run: Path, tmp_path: Path) -> None:
    """A mistyped folder costs nothing."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for target in (tmp_path / "home", tmp_path / "file"):
        for place in (run, export_place(run, tmp_path / "out", verify=False).folder):
            with pytest.raises(ValueError, match="export replaces what is there"):
                export_place(place, target, verify=False)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
