"""An encoder or a classifier leaves: a folder that timm and transformers load with nothing of ours installed.

    model.safetensors   the model as timm names it, nothing else
    config.json         timm's format: architecture, model_args, pretrained_cfg; plus `ssl`, how it was trained
    heads.safetensors   optional: projection heads, decoders, mask token; for continuing or distilling
    README.md           the model card

timm writes the configuration; what it takes from the architecture's published weights (tag, licence, mean, image size,
origin) is replaced by the facts of this encoder, and what transformers cannot read (`model_args.num_classes`) is taken
out. The folder appears by one rename, after it was loaded in a fresh process with equal outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from .. import __version__
from ..checkpoint import nonfinite, separate
from ..storage import StorageError, publish
from .card import write_card
from .facts import CardFacts
from .folder import CARD, CONFIG, HEADS, refuse_foreign
from .verify import VerifyReport, plain_copy, verify_export

# what a reader of the weights needs to build the model; every other key describes somebody else's training
_KEPT = ("custom_load", "fixed_input_size", "num_classes", "pool_size", "first_conv", "classifier")


class Export(NamedTuple):
    """A finished export."""

    folder: Path
    report: VerifyReport | None
    """what was checked; None if that was not asked for"""


def export_encoder(
    model: nn.Module,
    folder: Path,
    *,
    input_size: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    card: CardFacts,
    licence: str = "other",
    heads: Mapping[str, Tensor] | None = None,
    model_args: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    crop_pct: float = 1.0,
    verify: bool = True,
) -> Export:
    """Write `model` to `folder`; an earlier export there is replaced once the new one is complete and checked.

    Args:
        model: built by `timm.create_model(..., num_classes=0)`, or as many classes as there are `labels`; on any
            device; it is not changed.
        input_size: (channels, height, width) that it was trained at.
        mean, std: of each channel, in 0..1.
        licence: licence identifier of the Hub, chosen by who trained the weights.
        heads: other tensors of the run, by name.
        model_args: arguments of `timm.create_model` that timm did not record.
        labels: names of a classifier's classes; None: an encoder.
        crop_pct: share of an image's side that users should cut out of its centre.
        verify: load it in a fresh process and compare outputs.

    Raises:
        ValueError: the model cannot be exported, or the copy does not give equal outputs; `folder` is as it was.
        StorageError: the disk refuses, e.g. because it is full; `folder` is as it was.
    """
    refuse_foreign(folder)
    plain = plain_copy(model)
    _check(plain, input_size, mean, std, labels)
    data = {
        "input_size": tuple(input_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": "center",
    }
    report = None
    try:
        with publish(folder) as path:
            save_for_hf(plain, str(path), model_args=dict(model_args or {}), safe_serialization=True, data_config=data)
            config = _patch(json.loads((path / CONFIG).read_text()), data, card, licence)
            if labels is not None:
                config["label_names"] = list(labels)
            (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            if heads:
                save_file(separate(heads), path / HEADS, metadata={"format": "pt"})
            (path / CARD).write_text(write_card(plain, config, card, licence, heads=tuple(heads or ())))
            if verify:
                report = verify_export(path, model)
    except SafetensorError as error:  # safetensors' own word for a disk that refuses
        raise StorageError(f"cannot write {folder}: {error}") from error
    return Export(folder, report)


def _patch(config: dict[str, Any], data: Mapping[str, Any], card: CardFacts, licence: str) -> dict[str, Any]:
    """timm's configuration with the facts of this encoder instead of those of the published weights."""
    config["model_args"].pop("num_classes", None)  # transformers passes its own: "multiple values for num_classes"
    kept = {key: config["pretrained_cfg"][key] for key in _KEPT if key in config["pretrained_cfg"]}
    facts: dict[str, Any] = {"tag": "hybrid_ssl", **data, "license": licence}
    if card.papers:
        facts["paper_ids"] = [f"arXiv:{paper}" for paper in card.papers]
    config["pretrained_cfg"] = facts | kept
    config["model_type"] = "timm_wrapper"
    config["ssl"] = {"hybrid_ssl": __version__} | card.summary()
    return config


def _check(
    model: nn.Module,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    labels: Sequence[str] | None,
) -> None:
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(
            f"{type(model).__name__} was not built by timm.create_model, so its arguments are not recorded"
        )
    count = getattr(model, "num_classes", 0)
    if count and labels is None:
        raise ValueError(f"the model has a classifier of {count} classes: build it with num_classes=0, or give labels")
    if labels is not None and len(labels) != count:
        raise ValueError(f"there are {len(labels)} labels for a classifier of {count} classes")
    if getattr(model, "global_pool", None) == "":
        raise ValueError(
            "the model does not pool (global_pool=''), so users would get tokens where they expect features: "
            "set encoder.args.global_pool to token or avg"
        )
    if not len(mean) == len(std) == input_size[0]:
        raise ValueError(f"{input_size[0]} channels, but {len(mean)} means and {len(std)} standard deviations")
    broken = nonfinite(model.state_dict())
    if broken:
        raise ValueError(f"the encoder is not exported, {len(broken)} tensors are not finite: {', '.join(broken[:5])}")
