"""Every objective alone and mixes of them, trained for 200 steps: does the loss fall, do features live?

    python -m tests.trials docs/trials.json [NAME ...]     # writes the numbers that docs/objectives.md shows

Each recipe of `recipes/` with a single objective is made small; a mix is two or three of them laid over each other,
with views and masks of its own for each. `tests/test_trials.py` (slow) asserts what can be expected of so few steps.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from hybrid_ssl.config import Recipe, build_recipe
from hybrid_ssl.monitor.log import read_metrics
from hybrid_ssl.objectives import OBJECTIVES
from hybrid_ssl.train import Run

from .test_recipes import RECIPES, reduced

STEPS, IMAGES, BATCH = 200, 1280, 32
WIDER = {"hidden": 256, "dim": 64, "bottleneck": 64, "out_dim": 512, "prototypes": 128, "queue": 256}
"""heads of a size at which the methods work; those of `reduced` are only there to run"""
PARTS = ("views", "masks", "objectives")


def alone() -> dict[str, dict[str, Any]]:
    """Objective -> its reduced recipe as plain data, from the first recipe from scratch that has it, best alone."""
    found: dict[str, dict[str, Any]] = {}
    for single in (True, False):
        for path in RECIPES:
            recipe = reduced(path)
            if recipe.encoder.init is not None:
                continue
            names = list(recipe.used_names.values())
            for name in names:
                if name not in found and (len(names) == 1 or not single) and recipe.encoder.name.startswith("vit"):
                    found[name] = recipe.model_dump(mode="json")
    return {name: found[name] for name in OBJECTIVES if name in found}


def mixes(count: int = 10, seed: int = 0) -> dict[str, dict[str, Any]]:
    """`a+b` or `a+b+c` -> merged recipe, drawn at random."""
    rng, recipes = random.Random(seed), alone()
    plain = [name for name, data in recipes.items() if not data["data"].get("modalities") and not data.get("frozen")]
    mixed: dict[str, dict[str, Any]] = {}
    while len(mixed) < count:
        names = rng.sample(plain, rng.choice([2, 2, 3]))
        if len({len(recipes[name]["objectives"]) for name in names}) == 1:
            mixed["+".join(names)] = merge({name: recipes[name] for name in names})
    return mixed


def merge(recipes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Lay recipes over each other; views and masks get their objective's name in front, so that none is replaced."""
    base = dict(next(iter(recipes.values())))
    for part in PARTS:
        base[part] = {}
    for owner, data in recipes.items():
        names = {name: f"{owner}_{name}" for part in ("views", "masks") for name in data[part]}
        for part in PARTS:
            for label, entry in data[part].items():
                base[part][names.get(label, label)] = _renamed(entry, names)
    return base


def _renamed(node: Any, names: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            key: _renamed(value, names) if key not in ("name", "kind", "crop") else value for key, value in node.items()
        }
    if isinstance(node, list):
        return [_renamed(item, names) for item in node]
    return names.get(node, node) if isinstance(node, str) else node


def trial_recipe(data: dict[str, Any], out: Path) -> Recipe:
    """The same data, encoder size and optimizer for all: what differs are the objectives."""
    data = json.loads(json.dumps(data))
    data["run"] |= {
        "length": f"{STEPS} steps",
        "batch_size": BATCH,
        "micro_batch": BATCH,
        "out": str(out),
        "threads": 1,
    }
    data["run"] |= {"checkpoint_every": "100%", "precision": "fp32", "seed": 1}
    data["data"] |= {"limit": IMAGES, "probe": {"train_images": 1000, "test_images": 500}}
    data["encoder"]["args"] |= {"embed_dim": 96}
    for entry in data["objectives"].values():
        entry |= {key: value for key, value in WIDER.items() if isinstance(entry.get(key), int)}
    data["teacher"] |= {"momentum": {"start": 0.95, "end": 1.0, "shape": "cosine"}}
    data["optimizer"] = {"lr": 5e-4, "lr_per": None, "warmup": "10%", "weight_decay": 0.05, "clip": {"norm": 1.0}}
    data["monitor"] = {"log_every": 20, "probe_every": None}
    data["export"] = {"verify": False}
    return build_recipe(data)


def run_trial(data: dict[str, Any]) -> dict[str, float]:
    """Train, and return the first and last loss, k-NN at start and end, and the feature std at the end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run = Run(trial_recipe(data, out))
        code = run.fit(out, None)
        assert code == 0, f"exit code {code}"
        rows = read_metrics(out / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    last = rows[-1]
    knn = [last[key] for key in ("student/knn", "teacher/knn") if key in last]
    return {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "knn_start": rows[0]["student/knn"],
        "knn_end": max(knn),
        "std": last["student/std"],
    }


def main(target: Path, names: list[str]) -> None:
    found: dict[str, dict[str, float]] = json.loads(target.read_text()) if target.exists() else {}
    for name, data in (alone() | mixes()).items():
        if names and name not in names:
            continue
        try:
            found[name] = {key: round(value, 4) for key, value in run_trial(data).items()}
            print(name, found[name], flush=True)
        except Exception as error:  # one that fails must not lose the others
            print(name, "FAILED", repr(error)[:300], flush=True)
            continue
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
