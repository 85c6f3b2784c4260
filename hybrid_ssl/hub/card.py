"""The model card: written from the tensors and the facts of the run, never typed. YAML is written by a YAML writer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from ..encoder.official import SUFFIXES
from .facts import LOCAL, CardFacts, is_public

LICENCES = {
    "other", "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0", "pddl",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0",
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-2.0", "eupl-1.1",
    "openrail", "openrail++", "creativeml-openrail-m", "odbl", "odc-by", "cdla-permissive-2.0", "artistic-2.0",
}  # fmt: skip
"""Identifiers that the Hub takes as they are (its list is longer); it refuses a card with any other, so others are
written as `other` with a `license_name`."""


def write_card(
    model: nn.Module, config: Mapping[str, Any], facts: CardFacts, licence: str, heads: Sequence[str] = ()
) -> str:
    """The text of README.md.

    Args:
        model: the encoder; sizes are counted from its tensors.
        config: the finished config.json.
        heads: names in heads.safetensors.
    """
    sections = [
        f"# {facts.title}",
        _introduction(model, config, facts),
        _loading(config),
        _training(facts),
        _numbers(facts, "measured on" if "label_names" in config else "features of"),
        _contents(heads),
        _citations(facts),
        f"Licence of the weights: `{licence}`, chosen by who trained them.",
    ]
    task = "image-classification" if "label_names" in config else "image-feature-extraction"
    return f"---\n{_metadata(facts, licence, task).to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def _metadata(facts: CardFacts, licence: str, task: str) -> ModelCardData:
    results = [
        EvalResult(
            task_type=task,
            dataset_type=(facts.public_data or ["private"])[0],
            dataset_name=(facts.public_data or [LOCAL])[0],
            metric_type="accuracy",
            metric_name=f"{facts.probe_name} ({who})",
            metric_value=round(value, 4),
        )
        for who, value in facts.probe.items()
    ]
    known = licence in LICENCES
    return ModelCardData(
        license=licence if known else "other",
        license_name=None if known else re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-"),
        library_name="timm",
        pipeline_tag=task,
        tags=["self-supervised-learning", "hybrid_ssl", *facts.methods, "timm", "transformers"],
        datasets=[name for name in facts.public_data if "/" in name] or None,
        base_model=facts.base_model if facts.base_model and is_public(facts.base_model) else None,
        model_name=facts.title if results else None,
        eval_results=results or None,
    )


def _introduction(model: nn.Module, config: Mapping[str, Any], facts: CardFacts) -> str:
    channels, height, width = config["pretrained_cfg"]["input_size"]
    count = sum(p.numel() for p in model.parameters())
    trained = f", pretrained with {_listed(facts.objectives)}" if facts.objectives else ""
    lines = [
        f"The {_what(facts, config)} of a run of hybrid_ssl: timm's `{config['architecture']}`{trained}.",
        "",
        f"- parameters: {count / 1e6:.2f} million; features: {config['num_features']}, pooled by "
        f"`{config.get('global_pool', 'the model')}`",
        f"- images: {channels} channels, {height} x {width} pixels, scaled to 0..1, then mean "
        f"{_numbers_text(config['pretrained_cfg']['mean'])}, std {_numbers_text(config['pretrained_cfg']['std'])}",
    ]
    if prefix := getattr(model, "num_prefix_tokens", 0):
        lines.append(f"- tokens: the first {prefix} are class and register tokens, the patches follow")
    return "\n".join(lines)


def _what(facts: CardFacts, config: Mapping[str, Any]) -> str:
    classes = config.get("label_names")
    return f"classifier ({len(classes)} classes)" if classes else f"{facts.network} encoder"


_LOAD = """## Load it

From this folder (`local-dir:FOLDER`) or from the Hub (`hf-hub:USER/NAME`):

```python
import timm
{what} = timm.create_model('local-dir:FOLDER', pretrained=True).eval()
{timm}
```

```python
from transformers import {auto}
{what} = {auto}.from_pretrained('FOLDER').eval()
{transformers}
```"""


def _loading(config: Mapping[str, Any]) -> str:
    channels = config["pretrained_cfg"]["input_size"][0]
    if "label_names" in config:
        text = _LOAD.format(
            what="classifier",
            timm="logits = classifier(images)  # [B, K], in the order of label_names in config.json",
            auto="AutoModelForImageClassification",
            transformers="logits = classifier(pixel_values=images).logits  # classifier.config.id2label: the names",
        )
    else:
        text = _LOAD.format(
            what="encoder",
            timm="features = encoder(images)  # [B, D]; encoder.forward_features(images): tokens",
            auto="AutoModel",
            transformers="features = encoder(pixel_values=images).pooler_output  # [B, D]; .last_hidden_state: tokens",
        )
    if channels != 3:
        text += (
            f"\n\nImage processors of transformers read 3 channels; normalise the {channels} of this encoder yourself."
        )
    return text


def _training(facts: CardFacts) -> str:
    rows = {
        "objectives (weight)": ", ".join(f"{label} ({weight})" for label, weight in facts.objectives.items()),
        "data": ", ".join(dict.fromkeys(n if is_public(n) else LOCAL for n in facts.data)),
        "images": f"{facts.images:,}" if facts.images else "",
        "steps": f"{facts.steps:,}" if facts.steps else "",
        "epochs": f"{facts.epochs:.4g}" if facts.epochs else "",
        "batch": f"{facts.batch_size:,}" if facts.batch_size else "",
        "wall time": f"{facts.seconds / 3600:.2f} h" if facts.seconds else "",
        "hardware": facts.hardware or "",
        "started from": _start(facts.base_model) if facts.base_model else "",
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *lines]) if lines else ""


def _start(base_model: str) -> str:
    if is_public(base_model):
        return base_model
    return "a checkpoint file" if Path(base_model).suffix in SUFFIXES else "an earlier run"


def _numbers(facts: CardFacts, whose: str) -> str:
    parts = []
    if facts.probe:
        lines = [f"| {_cell(who)} | {value:.4f} |" for who, value in facts.probe.items()]
        parts.append("\n".join([f"| {whose} | {_cell(facts.probe_name)} |", "|---|---|", *lines]))
    if facts.kept:
        likeness = ", ".join(f"{name} {value:.4f}" for name, value in facts.kept.items())
        parts.append(f"Likeness of the features to those of the encoder that the run started from: {likeness}.")
    return "\n\n".join(["## Numbers", *parts]) if parts else ""


def _contents(heads: Sequence[str]) -> str:
    if not heads:
        return ""
    parts = dict.fromkeys(name.split(".")[0] for name in heads)
    return f"`heads.safetensors` holds {len(heads)} tensors of the heads ({', '.join(parts)}); the encoder needs none."


def _citations(facts: CardFacts) -> str:
    lines = [f"- {what} [arXiv {p}](https://arxiv.org/abs/{p})" for what, p in facts.methods.values()]
    return "\n".join(["## Methods", "", *lines]) if lines else ""


def _listed(names: Mapping[str, str]) -> str:
    return " + ".join(names)


def _cell(text: str) -> str:
    """Text in a table cell: no markup, one line."""
    return re.sub(r"([|`*<>\[\]])", r"\\\1", " ".join(text.split()))


def _numbers_text(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values) + "]"
