"""Results side by side: every `results.json` below some folders as Markdown, a picture and JSON.

Results stand in one row only if nothing but the encoder's weights and the seed differs: task, metric, data,
architecture, steps, batch and settings are equal. What differs otherwise gets a row of its own, and a remark says what
the difference is, so that no table compares two budgets in silence. Numbers are means over seeds, with the sample
standard deviation (n - 1) and the number of seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ..storage import publish
from .results import RESULTS

KINDS = ("random", "pretrained", "public")
"""weights, in the order of the columns"""
_UNIMPORTANT = {  # of a recipe's `run`: they change no number that is compared
    "seed", "out", "workers", "threads", "keep", "checkpoint_every", "evaluate_every", "test_batch", "trackers",
    "micro_batch", "gradient_checkpointing", "compile",
}  # fmt: skip


class Result(NamedTuple):
    """One `results.json`."""

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        encoder = self.content["encoder"]
        return "random" if encoder["random"] else "public" if encoder.get("public") else "pretrained"

    @property
    def column(self) -> tuple[str, str]:
        """(kind, name of the encoder); random weights have none."""
        return self.kind, "" if self.kind == "random" else self.content["encoder"]["name"]

    @property
    def differences(self) -> dict[str, Any]:
        """What has to be equal within a row, by name."""
        content, encoder = self.content, self.content["encoder"]
        settings = _flat(content.get("settings", {}))
        for key in ("run." + name for name in _UNIMPORTANT):
            settings.pop(key, None)
        settings.pop("encoder.random", None)
        data = content["data"].get("fingerprint") or json.dumps(content["data"], sort_keys=True)
        own = {"task": content["task"], "metric": content["metric"], "architecture": encoder["architecture"]}
        own |= {"parameters": encoder["parameters"], "data": data}
        return own | {key: content.get(key) for key in ("steps", "batch_size")} | settings


class Number(NamedTuple):
    """A mean over seeds."""

    mean: float
    spread: float | None
    """sample standard deviation; None for one seed"""
    seeds: int


class Row(NamedTuple):
    """Results that differ in weights and seed alone."""

    task: str
    metric: str
    about: dict[str, str]
    """architecture, data and budget, as a person reads them"""
    cells: dict[tuple[str, str], dict[str, Number]]
    """(kind, encoder) -> metric -> number"""
    seeds: dict[tuple[str, str], list[int]]


class Table(NamedTuple):
    """All rows, and remarks about what is not alike."""

    rows: list[Row]
    remarks: list[str]


def gather(folders: Iterable[Path]) -> list[Result]:
    """Every result below `folders`.

    Raises:
        ValueError: there is none, or a file is no result.
    """
    places = list(folders)
    for place in places:
        if not place.exists():
            raise ValueError(f"{place} does not exist: give folders of evaluations and fine-tunings")
    paths = sorted({path.resolve() for place in places for path in place.rglob(RESULTS)})
    if not paths:
        raise ValueError(f"there is no {RESULTS} below {', '.join(map(str, places))}: have the runs ended?")
    return [Result(path, _read(path)) for path in paths]


def build_table(results: Sequence[Result]) -> Table:
    """Rows in the order of task, architecture and budget."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.differences, sort_keys=True), []).append(result)
    remarks: list[str] = []
    order = sorted(groups.values(), key=lambda group: _sorting(group[0]))
    rows = [_row(group, remarks) for group in order]
    return Table(rows, [*_apart(order), *remarks])


def write_tables(folders: Sequence[Path], out: Path) -> Table:
    """Write `table.md`, `table.png` and `table.json` into `out`; an earlier table there is replaced."""
    from .table_picture import draw_table  # Pillow and torch, seconds

    if out.is_dir() and any(path.name not in ("table.md", "table.png", "table.json") for path in out.iterdir()):
        raise ValueError(f"{out} holds other files, and tables replace what is there: choose a new folder")
    table = build_table(gather(folders))
    with publish(out) as folder:
        (folder / "table.md").write_text(as_markdown(table))
        (folder / "table.json").write_text(json.dumps(as_json(table), indent=1) + "\n")
        draw_table(table).save(folder / "table.png")
    return table


def as_markdown(table: Table) -> str:
    """One section for each row, with all its metrics; those of single classes are in the JSON."""
    parts = ["# Results", "Mean over seeds ± sample standard deviation (number of seeds)."]
    for row in table.rows:
        columns = list(row.cells)
        names = list(dict.fromkeys(name for cell in row.cells.values() for name in cell if "/" not in name))
        names.sort(key=lambda name: name != row.metric)
        head = ["", *(f"{kind} {name}".strip() for kind, name in columns)]
        lines = [[name, *(number_text(row.cells[column].get(name)) for column in columns)] for name in names]
        lines[0] = [f"**{text}**" if text else "" for text in lines[0]]
        grid = [head, ["---"] * len(head), *lines]
        parts.append(f"## {row.task}: {row.metric}")
        parts.append("\n".join(f"- {name}: {text}" for name, text in row.about.items()))
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in grid))
    if table.remarks:
        parts.append("## Remarks")
        parts.append("\n".join(f"- {remark}" for remark in table.remarks))
    return "\n\n".join(parts) + "\n"


def as_json(table: Table) -> dict[str, Any]:
    """Everything, as plain data."""
    rows = []
    for row in table.rows:
        cells = [
            {
                "weights": kind,
                "encoder": name,
                "seeds": row.seeds[kind, name],
                "metrics": {metric: number._asdict() for metric, number in cell.items()},
            }
            for (kind, name), cell in row.cells.items()
        ]
        rows.append({"task": row.task, "metric": row.metric, **row.about, "columns": cells})
    return {"rows": rows, "remarks": table.remarks}


def number_text(number: Number | None) -> str:
    """`0.873 ± 0.004 (2)`; one seed has no spread."""
    if number is None:
        return ""
    spread = "" if number.spread is None else f" ± {number.spread:.3f}"
    return f"{number.mean:.3f}{spread} ({number.seeds})"


def _read(path: Path) -> dict[str, Any]:
    wanted = {"task", "metric", "value", "metrics", "encoder", "data", "seed"}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    missing = wanted - content.keys() if isinstance(content, dict) else wanted
    if missing:
        raise ValueError(f"{path} is no result of this library: {', '.join(sorted(missing))} not in it")
    return dict(content)


def _sorting(result: Result) -> tuple[str, str, str, int]:
    own = result.differences
    return own["task"], own["architecture"], str(own["data"]), own["steps"] or 0


def _row(group: Sequence[Result], remarks: list[str]) -> Row:
    first = group[0].content
    runs: dict[tuple[str, str], dict[int, Result]] = {}
    for result in sorted(group, key=lambda result: result.path.stat().st_mtime_ns):
        seeds = runs.setdefault(result.column, {})
        if result.content["seed"] in seeds:
            name = " ".join(result.column).strip()
            remarks.append(
                f"{_title(first)}, {name}: seed {result.content['seed']} is there twice, the newer one counts"
            )
        seeds[result.content["seed"]] = result
    order = sorted(runs, key=lambda column: (KINDS.index(column[0]), column[1]))
    cells = {column: _numbers(list(runs[column].values())) for column in order}
    numbers = {column: sorted(runs[column]) for column in order}
    if len({tuple(seeds) for seeds in numbers.values()}) > 1:
        told = "; ".join(f"{' '.join(column).strip()} {seeds}" for column, seeds in numbers.items())
        remarks.append(f"{_title(first)}: not the same seeds: {told}")
    if problems := first["data"].get("problems"):
        remarks.append(f"{_title(first)}, data: {'; '.join(map(str, problems))}")
    return Row(first["task"], first["metric"], _about(first), cells, numbers)


def _numbers(results: Sequence[Result]) -> dict[str, Number]:
    """Metric -> number, of those that every run has."""
    measured = [result.content["metrics"] for result in results]
    out = {}
    for name in measured[0]:
        values = [metrics[name] for metrics in measured if isinstance(metrics.get(name), (int, float))]
        if len(values) == len(measured):
            out[name] = Number(fmean(values), stdev(values) if len(values) > 1 else None, len(values))
    return out


def _about(content: Mapping[str, Any]) -> dict[str, str]:
    encoder, data = content["encoder"], content["data"]
    facts = {name: value for name, value in _flat(data).items() if name not in ("fingerprint", "problems", "broken")}
    shown = [f"{name.replace('images.', '')} {value}" for name, value in facts.items() if _is_plain(value)]
    budget = f"{content['steps']} steps x {content['batch_size']} images" if "steps" in content else ""
    about = {
        "encoder": f"{encoder['architecture']}, {encoder['parameters'] / 1e6:.2f} M parameters",
        "data": ", ".join(shown),
        "budget": budget,
        "hardware": str(content.get("hardware", "")),
    }
    return {name: text for name, text in about.items() if text}


def _apart(groups: Sequence[Sequence[Result]]) -> list[str]:
    """What keeps rows of one task and architecture apart."""
    alike: dict[tuple[str, str], list[Result]] = {}
    for group in groups:
        own = group[0].differences
        alike.setdefault((own["task"], own["architecture"]), []).append(group[0])
    remarks = []
    for (task, architecture), ones in alike.items():
        each = [result.differences for result in ones]
        names = [name for name in dict.fromkeys(key for own in each for key in own) if len(_values(each, name)) > 1]
        if names:
            told = "; ".join(f"{name}: {' / '.join(_values(each, name))}" for name in names[:6])
            more = f"; and {len(names) - 6} more" if len(names) > 6 else ""
            remarks.append(
                f"{task}, {architecture}: {len(ones)} rows that must not be compared, they differ in {told}{more}"
            )
    return remarks


def _values(each: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(_short(own.get(name)) for own in each))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:10] + "..." + text[-10:]


def _title(content: Mapping[str, Any]) -> str:
    return f"{content['task']}, {content['encoder']['architecture']}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool) and str(value) != ""


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b` -> value; lists as they are."""
    if not isinstance(node, Mapping):
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out
