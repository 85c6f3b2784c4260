"""Strict settings from YAML: no duplicate keys, overrides, and errors that name the nearest key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class RecipeError(ValueError):
    """Something the user has to change: what was given, what is allowed, what to do."""


def read_mapping(path: str | Path | None, overrides: Sequence[str], sections: Sequence[str]) -> dict[str, Any]:
    """The plain data of a YAML file (None: of no file) with `key.path=value` overrides in it.

    Raises:
        RecipeError: the file cannot be read, or is no mapping.
    """
    raw: Any = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {path}: {error}") from error
        raw = parse_yaml(text, where=str(path))
        if not isinstance(raw, dict):
            raise RecipeError(f"{path} is no recipe: it must be a mapping with the sections {', '.join(sections)}")
    for override in overrides:
        _apply(raw, override)
    return raw


def check(model: type[Model], raw: Mapping[str, Any]) -> Model:
    """Plain data as settings; all problems are reported at once, as a `RecipeError`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = dict.fromkeys(sentences(error, model, raw))
        raise RecipeError("\n  ".join(["the recipe has to be changed:", *problems])) from error


def dump_yaml(data: Any) -> str:
    """Plain data as YAML."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML with YAML 1.2 floats (`1e-4` is a number), without duplicate keys and without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} appears twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$|[-+]?(\d[\d_]*)\.[\d_]*$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Short lists of numbers on one line; everything else as blocks."""

    def represent_sequence(self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; problems come with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from error


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{override!r} is no override: write key.path=value, e.g. optimizer.lr=1e-4")
    node = raw
    for depth, key in enumerate(keys[:-1]):
        below = node.setdefault(key, {})
        if not isinstance(below, dict):
            raise RecipeError(f"{override!r}: {'.'.join(keys[: depth + 1])} is {below!r} and has no keys below it")
        node = below
    node[keys[-1]] = parse_yaml(text, where=override)


# what people type for a key that this schema calls otherwise, beyond what difflib finds
_ALIASES = {
    "learning_rate": "lr", "wd": "weight_decay", "bs": "batch_size", "epochs": "length", "steps": "length",
    "model": "name", "backbone": "encoder", "img_size": "size", "num_workers": "workers", "path": "source",
    "output": "out", "output_dir": "out", "amp": "precision", "mixed_precision": "precision", "ema": "momentum",
}  # fmt: skip


_MAPPINGS = {"model_type", "model_attributes_type", "dict_type"}


def sentences(error: ValidationError, model: type[BaseModel], data: Any) -> list[str]:
    """What is wrong, one sentence for each problem, with the path as the user wrote it."""
    problems = error.errors(include_url=False)
    places = [_place(problem["loc"], data, missing=problem["type"] == "missing") for problem in problems]
    found: dict[str, str] = {}  # path -> sentence
    wanted: dict[str, list[str]] = {}  # path -> what it should be: of a union every branch complains by itself
    for problem, place in zip(problems, places, strict=True):
        path, kind = ".".join(place), problem["type"]
        if kind == "extra_forbidden":
            found[path] = f"{path}: unknown key{_nearest(place[-1], _fields_at(model, problem['loc'][:-1]))}"
        elif kind == "missing":
            found[path] = f"{path}: has to be given"
        elif kind.startswith("union_tag"):
            context = problem["ctx"]
            key = context["discriminator"].strip("'")
            allowed = context.get("expected_tags", "'random', 'block'")
            found[path] = f"{path}.{key}: {context.get('tag', 'nothing')!r} given, allowed are: {allowed}"
        elif kind == "value_error":
            found[path] = f"{path + ': ' if path else ''}{problem['ctx']['error']}"
        elif not any(len(other) > len(place) and other[: len(place)] == place for other in places):
            message = problem["msg"].split(" should ", 1)[-1].replace("a valid integer", "an integer")
            message = message.replace("a valid ", "a ")
            wanted.setdefault(path, []).append("be a mapping" if kind in _MAPPINGS else message)
            found[path] = f"{path}: should {' or '.join(wanted[path])}, got {problem['input']!r}"
    return list(found.values())


def _place(loc: tuple[Any, ...], data: Any, missing: bool) -> list[str]:
    """The path as the user wrote it: pydantic also names the branches of unions."""
    place = []
    for depth, part in enumerate(loc):
        below = isinstance(data, Mapping) and part in data or isinstance(data, list) and isinstance(part, int)
        if below:
            data = data[part]
        if below or missing and depth == len(loc) - 1:
            place.append(str(part))
    return place


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if key in _ALIASES and _ALIASES[key] in known:
        near = [_ALIASES[key]]
    return f" (did you mean {near[0]!r}?)" if near else f"; known are: {', '.join(known)}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The keys that are allowed where `loc` points to."""
    current: Any = model
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        models = _models_in(current)
        named = [m for m in models if str(part) in (m.__name__, _kind_of(m))]
        current = next(iter(named or models), None)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    return [model for a in inner for model in _models_in(a)]


def _kind_of(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return getattr(kind.annotation, "__args__", (None,))[0] if kind else None
