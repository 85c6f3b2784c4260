"""A recipe is read strictly; every problem is a sentence with the place, and all of them come at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybrid_ssl.config import Recipe, build_recipe, dump_recipe, read_recipe
from hybrid_ssl.reading import RecipeError, parse_yaml
from tests.runs import VIT, recipe_data, write_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file with most sections."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), recipe_data("out"))


def minimal(**sections: Any) -> dict[str, Any]:
    return {
        "run": {"length": "1 epochs", "batch_size": 8, "out": "out"},
        "encoder": {"name": "vit_tiny_patch16_224"},
        "data": {"source": "images"},
        "views": {"plain": {"size": 32}},
        "masks": {"random": {"kind": "random", "view": "plain", "ratio": 0.75}},
        "objectives": {"mae": {}},
        "optimizer": {"lr": 1e-4},
    } | sections


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    first, *sentences = str(caught.value).split("\n  ")
    assert first == "the recipe has to be changed:"
    return sentences


def test_overrides_are_yaml_and_reach_any_depth(path: Path) -> None:
    changes = ["optimizer.lr=1e-4", "run.trackers=[tensorboard]", "data.probe=null", "encoder.args.reg_tokens=4"]
    recipe = read_recipe(path, [*changes, "objectives.mae.weight={start: 0.0, end: 1, over: 10%}"])
    assert recipe.optimizer.lr == 1e-4 and recipe.run.trackers == ["tensorboard"] and recipe.data.probe is None
    assert recipe.encoder.args == VIT["args"] | {"reg_tokens": 4}
    assert recipe.objectives["mae"].weight.end == 1.0


def test_all_problems_come_at_once(path: Path) -> None:
    found = problems(path, "optimizer.lrr=1", "run.batch_size=x", "objectives.mae.norm_pixel=1", "objectives.simclrr=")
    assert len(found) == 4
    assert all(any(word in line for line in found) for word in ("lrr", "batch_size", "norm_pixel", "simclrr"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key (did you mean 'lr'?)"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key (did you mean 'lr'?)"),
        ("optimiser.lr=1", "optimiser: unknown key (did you mean 'optimizer'?)"),
        ("data.probe.train_image=1", "data.probe.train_image: unknown key (did you mean 'train_images'?)"),
        ("masks.random.rato=1", "masks.random.rato: unknown key (did you mean 'ratio'?)"),
        ("views.global.jitter.bright=1", "views.global.jitter.bright: unknown key (did you mean 'brightness'?)"),
        ("objectives.mae.decoder_dm=4", "objectives.mae.decoder_dm: unknown key (did you mean 'decoder_dim'?)"),
        ("objectives.mae.zzz=4", "objectives.mae.zzz: unknown key; known are: name, weight, view"),
        ("run.batch_size=1.5", "run.batch_size: should be an integer, got 1.5"),
        ("run.batch_size='8'", "run.batch_size: should be an integer, got '8'"),
        ("run.batch_size=yes", "run.batch_size: should be an integer, got True"),
        ("run=3", "run: should be a mapping, got 3"),
        ("data.source=5", "data.source: should be a string or be a list, got 5"),
        ("teacher.momentum=abc", "teacher.momentum: should be a number or be a mapping, got 'abc'"),
        ("teacher.momentum={start: 0.9}", "teacher.momentum.end: has to be given"),
        ("teacher.momentum=1.5", "teacher.momentum: should be from 0 to 1, got 1.5"),
        ("teacher.momentum={start: 0.9, end: 2}", "teacher.momentum: should be from 0 to 1, got 2"),
        ("optimizer.lr=.nan", "optimizer.lr: should be a finite number, got nan"),
        ("optimizer.lr=1e6", "optimizer.lr: should be less than or equal to 100"),
        ("optimizer.lr=-1", "optimizer.lr: should be greater than 0, got -1"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: should be from 0 to 10, got -1"),
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1: should be less than 1, got 2"),
        ("objectives.mae.weight=-1", "objectives.mae.weight: should be from 0 to 1e+06, got -1"),
        ("run.seed=1e30", "run.seed: should be an integer"),
        ("run.seed=-1", "run.seed: should be greater than or equal to 0"),
        ("run.length=5%", "run.length: '5%' is a share of what?"),
        ("run.length=ten epochs", "run.length: 'ten epochs' is no duration"),
        ("run.length=1e99 steps", "run.length: '1e99 steps' is too long"),
        ("masks.random.kind=bloc", "masks.random.kind: 'bloc' given, allowed are: 'random', 'block'"),
        ("masks.random.view=other", "mask 'random' is for view 'other'; views are: global, local, plain"),
        ("views.plain.blur=[0.5, 0.5]", "views.plain: blur lists 2 probabilities for 1 crops"),
        ("objectives.mae=3", "objectives.mae: settings are a mapping, got 3"),
        ("objectives.mea={}", "objectives.mea: no objective named 'mea'; did you mean mae?"),
        ("objectives={keys: {name: mae}}", "objectives.keys: a label is a word"),
        ("objectives={a.b: {name: mae}}", "objectives.a.b: a label is a word"),
        ("objectives={1: {name: mae}}", "objectives.1: a label is a word"),
        ("objectives={}", "objectives: should have at least 1 item"),
        ("objectives.mine={name: 'no_such_package.x:Mine'}", "objectives.mine: objective 'no_such"),
    ],
)  # fmt: skip
def test_problem_is_said_at_its_place(path: Path, override: str, sentence: str) -> None:
    assert problems(path, override)[0].startswith(sentence)


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=3", ".lr=2"])
def test_what_is_no_override_is_refused(path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=r"no override: write key\.path=value"):
        read_recipe(path, [override])


def test_override_below_a_number_is_refused(path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.batch_size is 8 and has no keys below it"):
        read_recipe(path, ["run.batch_size.x=3"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("run: {length: [}", "not valid YAML.*line 1"),
        ("a: 1\na: 2\n", "the key 'a' appears twice"),
        ("a: &x 1\nb: *x\n", "aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("- 1\n", "must be a mapping with the sections run, encoder, data"),
        ("", "must be a mapping"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        read_recipe(file)


def test_missing_file_and_binary_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        ("2.", 2.0),
        ("-1e+2", -100.0),
        ("7", 7),
        ("5 epochs", "5 epochs"),
        ("1e", "1e"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"x: {text}", where="here")["x"]
    assert found == value and type(found) is type(value)


def test_resolved_recipe_shows_every_default_and_reads_back() -> None:
    recipe = build_recipe(minimal())
    text = dump_recipe(recipe)
    assert build_recipe(parse_yaml(text, "dump")) == recipe
    shown = parse_yaml(text, "dump")
    for section in ("run", "encoder", "data", "optimizer", "monitor", "export", "teacher"):
        assert shown[section].keys() == type(getattr(recipe, section)).model_fields.keys()
    assert shown["objectives"]["mae"].keys() == type(recipe.objectives["mae"]).model_fields.keys()


def test_two_entries_of_one_objective_have_their_own_labels() -> None:
    recipe = build_recipe(minimal(objectives={"a": {"name": "mae"}, "b": {"name": "mae", "weight": 0.5}}))
    assert recipe.used_names == {"a": "mae", "b": "mae"}


def test_recipe_is_frozen() -> None:
    recipe = build_recipe(minimal())
    with pytest.raises(ValueError, match="frozen"):
        recipe.run.batch_size = 3  # type: ignore[misc]


def test_missing_sections_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({"views": {"plain": {}}})
    for section in ("run", "encoder", "data", "objectives", "optimizer"):
        assert f"{section}: has to be given" in str(caught.value)
    assert set(Recipe.model_fields) >= {"run", "views", "export"}
