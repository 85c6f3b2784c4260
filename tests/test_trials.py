"""Every objective and ten mixes: resumed runs have the same bits; 200 steps (slow) leave features alive."""

from __future__ import annotations

import shutil
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_ssl.checkpoint import checkpoints, load
from hybrid_ssl.config import build_recipe
from hybrid_ssl.train import Run

from .trials import alone, mixes, run_trial, trial_recipe

TRIALS = alone() | mixes()
STEPS = 4


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIALS)
def test_trains_without_collapse(name: str) -> None:
    result = run_trial(TRIALS[name])
    assert all(isfinite(value) for value in result.values())
    if name != "colorization":  # the images are gray: there is no colour to tell, and its features come near a point
        assert result["std"] > 0.01, "the features have collapsed to a point"
    assert result["knn_end"] > 0.2, "chance is 0.1; untrained encoders of this size reach 0.1 to 0.6"


@pytest.mark.parametrize("name", TRIALS)
def test_resume_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    _run(TRIALS[name], whole, None)
    middle = next(path for path in checkpoints(whole / "checkpoints") if path.name.endswith(f"{STEPS // 2:08d}"))
    (again / "checkpoints").mkdir(parents=True)
    shutil.copytree(middle, again / "checkpoints" / middle.name)
    _run(TRIALS[name], again, again / "checkpoints" / middle.name)
    want, got = (load(checkpoints(out / "checkpoints")[0])[0] for out in (whole, again))
    assert want.keys() == got.keys()
    assert not [key for key in want if not torch.equal(want[key], got[key])]


def _run(data: dict[str, Any], out: Path, found: Path | None) -> None:
    full = trial_recipe(data, out).model_dump(mode="json")
    full["run"] |= {"length": f"{STEPS} steps", "checkpoint_every": f"{STEPS // 2} steps", "keep": 5, "batch_size": 8}
    full["run"]["micro_batch"] = 8
    full["data"] |= {"limit": 24, "probe": {"train_images": 20, "test_images": 10}}
    assert Run(build_recipe(full)).fit(out, found) == 0
