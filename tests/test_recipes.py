"""Every recipe parses, says what it was run on, carries the paper's numbers, and trains when it is made small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrid_ssl.assemble import build_groups, build_pretrainer, lay_out, used_views
from hybrid_ssl.config import Recipe, build_recipe, dump_recipe, read_recipe
from hybrid_ssl.data.loader import Loader
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.optim import build_optimizer, peak_lr
from hybrid_ssl.plan import Progress
from hybrid_ssl.pretrainer import Pretrainer
from hybrid_ssl.reading import parse_yaml
from tests.tiny_encoder import shared_encoder, shared_start
from tests.tiny_tokenizer import shared_tokenizer

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

PUBLISHED = {  # learning rate of a step, images in it, length: as the papers and releases print them
    "mae_vitb": (2.4e-3, 4096, "1600 epochs"),
    "mae_vitl": (2.4e-3, 4096, "1600 epochs"),
    "simmim_vitb": (4e-4, 2048, "800 epochs"),
    "simmim_swinb": (8e-4, 2048, "100 epochs"),
    "mocov3_vits": (2.4e-3, 4096, "300 epochs"),
    "mocov3_vitb": (2.4e-3, 4096, "300 epochs"),
    "dino_vits": (2e-3, 1024, "800 epochs"),
    "dino_vitb": (3e-3, 1024, "400 epochs"),
    "ibot_vits": (2e-3, 1024, "800 epochs"),
    "ibot_vitb": (3e-3, 1024, "400 epochs"),
    "ibot_swint": (2e-3, 1024, "300 epochs"),
    "dinov2_vitl": (4e-3 * 2**0.5, 2048, "125000 steps"),
    "lejepa_vits": (2e-3, 256, "800 epochs"),
    "msn_vits": (1e-3, 1024, "800 epochs"),
    "multimae_vitb": (8e-4, 2048, "1600 epochs"),
    "beit_vitb": (1.5e-3, 2048, "800 epochs"),
    "maskfeat_vitb": (1.6e-3, 2048, "300 epochs"),
    "data2vec_vitb": (2e-3, 2048, "800 epochs"),
    "ijepa_vitb": (1e-3, 2048, "600 epochs"),
}

SMALL_ENCODER = {
    "vit": ["embed_dim=48", "depth=2"],
    "swin": ["embed_dim=16", "depths=[1, 1, 2, 1]", "num_heads=[1, 2, 2, 4]", "window_size=2"],
}
SMALL_HEADS = {
    "mae": ["decoder_dim=32", "decoder_depth=1", "decoder_heads=2"],
    "simmim": [],
    "moco_v3": ["hidden=32", "dim=16"],
    "dino": ["out_dim=32", "hidden=32", "bottleneck=16"],
    "ibot": ["out_dim=32", "hidden=32", "bottleneck=16"],
    "dinov2": ["out_dim=32", "hidden=32", "bottleneck=16"],
    "gram": ["weight=2.0"],  # at once: its recipe begins late
    "distil": ["hidden=32"],
    "lejepa": ["hidden=32", "slices=16"],
    "msn": ["out_dim=32", "hidden=32", "dim=16"],
    "beit": [],
    "maskfeat": [],
    "data2vec": ["layers=2"],
    "ijepa": ["predictor_dim=48", "predictor_depth=1"],
    "simclr": ["hidden=32", "dim=16"],
    "supcon": ["hidden=32", "dim=16"],
    "moco_v1": ["dim=16", "queue=8"],
    "moco_v2": ["hidden=32", "dim=16", "queue=8"],
    "byol": ["hidden=32", "dim=16"],
    "simsiam": ["dim=32", "bottleneck=16"],
    "barlow_twins": ["hidden=32", "dim=32"],
    "vicreg": ["hidden=32", "dim=32"],
    "swav": ["prototypes=16", "hidden=32", "dim=16"],
    "rotation": [],
    "colorization": ["cells=2"],
    "sit": ["hidden=32", "dim=16"],
    "cmae": ["decoder_dim=32", "decoder_depth=1", "decoder_heads=2", "feature_depth=1", "hidden=32", "dim=16"],
    "multimae": ["decoder_dim=32", "decoder_depth=1", "decoder_heads=2"],
    "jigsaw": ["hidden=32"],
    "cutpaste": ["hidden=32", "bottleneck=16"],
}
STAND_INS = {"depth": "{derive: sobel}", "semseg": "{derive: levels, classes: 5}"}
SMALL_SIDE = {28: 28, 56: 16, 64: 64, 96: 32, 98: 32, 112: 32, 128: 64, 192: 64, 224: 64, 256: 64, 448: 128}


def reduced(path: Path) -> Recipe:
    """The recipe with a narrow encoder, small views and heads, and 16 embedded images; all else is its own."""
    full = read_recipe(path)
    changes = ["data.source=embedded:fashion_mnist", "data.limit=16", "run.length=2 steps", "run.precision=fp32"]
    changes += ["run.batch_size=4", "run.micro_batch=2", "run.workers=0"]
    small = SMALL_ENCODER[full.encoder.name.split("_")[0]]
    changes += [f"encoder.args.{change}" for change in small]
    if full.encoder.init is not None:  # weights that would be downloaded
        own = [f"{name}={json.dumps(value)}" for name, value in full.encoder.args.items()]
        changes += [f"encoder.init={shared_start(full.encoder.name, *own, *small)}"]
    unit = 14 if "patch14" in full.encoder.name else 1
    sides = {name: SMALL_SIDE[view.height_width[0]] // unit * unit for name, view in full.views.items()}
    changes += [f"views.{name}.size={side}" for name, side in sides.items()]
    changes += [f"data.modalities.{name}={STAND_INS[name]}" for name in full.data.modalities]
    changes += [f"masks.{name}.min_tokens=1" for name, mask in full.masks.items() if mask.kind == "block"]
    for name, frozen in full.frozen.items():
        if frozen.weights is None:
            changes += [f"frozen.{name}.after=0 steps", f"frozen.{name}.every=50 steps"]
        else:
            changes += [f"frozen.{name}.weights={shared_encoder()}"]
    for label, name in full.used_names.items():
        changes += [f"objectives.{label}.{change}" for change in SMALL_HEADS[name]]
        changes += [f"objectives.{label}.tokenizer={shared_tokenizer()}"] if name == "beit" else []
    return read_recipe(path, changes)


def loader_of(recipe: Recipe, pretrainer: Pretrainer) -> Loader:
    views, masks = used_views(recipe, pretrainer)
    return Loader(
        open_source(recipe.data),
        recipe.data,
        {name: recipe.views[name] for name in views},
        {name: recipe.masks[name] for name in masks},
        grids=pretrainer.spec.grids,
        stride=pretrainer.spec.stride,
        batch_size=recipe.run.batch_size,
        micro_batch=recipe.run.micro_batch,
        total_steps=2,
    )


def test_the_promised_recipes_are_there() -> None:
    hybrids = {"mae_mocov3_vitb", "mae_dino_vitb", "simmim_mocov3_swinb"}
    continued = {"continue_ibot_vitb", "continue_mae_vitb", "continue_dinov2_vits", "continue_quickstart"}
    assert PUBLISHED.keys() | hybrids | continued | {"quickstart", "fashion_mnist"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_reads_back_the_same(path: Path) -> None:
    recipe = read_recipe(path)
    assert build_recipe(parse_yaml(dump_recipe(recipe), where=path.stem)) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_has_the_command_and_the_hardware(path: Path) -> None:
    header = [line for line in path.read_text().splitlines()[:20] if line.startswith("#")]
    assert any(f"recipes/{path.name}" in line for line in header), "no command that can be copied"
    assert any(line.startswith("# hardware") for line in header), "run on what? or 'not yet run'"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_view_and_mask_has_a_user(path: Path) -> None:
    recipe = read_recipe(path)
    values = [value for settings in recipe.objectives.values() for value in vars(settings).values()]
    words = {word for value in values for word in (value if isinstance(value, list) else [value])}
    assert recipe.masks.keys() <= words and recipe.views.keys() <= words


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rate_batch_and_length_are_the_published_ones(name: str) -> None:
    recipe = read_recipe(FOLDER / f"{name}.yaml")
    lr, batch, length = PUBLISHED[name]
    assert peak_lr(recipe.optimizer, batch)[0] == pytest.approx(lr)
    assert (recipe.run.batch_size, recipe.run.length) == (batch, length)
    assert recipe.run.micro_batch is not None and batch % recipe.run.micro_batch == 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_moco_alone_moves_its_teacher_with_the_next_momentum(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.teacher.offset == any(name.startswith("moco_") for name in recipe.used_names.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_reduced_recipe_trains_two_steps_with_every_parameter(path: Path) -> None:
    recipe = reduced(path)
    channels = [0.5] * recipe.data.channels
    pretrainer = build_pretrainer(recipe, channels, channels, layout=lay_out(recipe, world=1))
    trained = {name: p for name, p in pretrainer.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(recipe.optimizer, build_groups(recipe, pretrainer))
    batches = loader_of(recipe, pretrainer).iterate()
    for step in range(2):
        for micro in range(2):
            loss, _ = pretrainer(next(batches), Progress(step, 2, 4, micro=micro))
            assert loss.isfinite()
            (loss / 2).backward()
        assert not [name for name, p in trained.items() if p.grad is None], "DDP would wait for these"
        optimizer.step()
        optimizer.zero_grad()
        pretrainer.move_teachers(0.9)
    assert all(p.isfinite().all() for p in trained.values())
