"""An encoder out of a run that is still going, was stopped, or wants another network than the one it handed over."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
from torch import Tensor

from .. import checkpoint
from ..config import build_recipe
from ..storage import publish
from .export import Export, export_encoder
from .facts import facts_of
from .folder import is_export, refuse_foreign
from .verify import verify_export

Network = Literal["auto", "teacher", "student"]


def export_place(
    place: Path, folder: Path, *, network: Network | None = None, licence: str | None = None, verify: bool = True
) -> Export:
    """Export from a run's folder, a checkpoint or an export; an export is copied as it is, and checked again.

    Args:
        place, folder, network, licence, verify: see `export_run`.

    Raises:
        ValueError: there is nothing to export; or another network or licence of an export is asked for.
    """
    if not is_export(place):
        return export_run(place, folder, network=network, licence=licence, verify=verify)
    if network is not None or licence is not None:
        raise ValueError(f"{place} is an export already, with its network and licence: export the run again instead")
    model = timm.create_model(f"local-dir:{place.resolve()}", pretrained=True)
    if folder.resolve() == place.resolve():
        return Export(folder, verify_export(folder, model) if verify else None)
    refuse_foreign(folder)
    report = None
    with publish(folder) as path:
        for file in place.iterdir():
            if file.is_file():
                shutil.copyfile(file, path / file.name)
        if verify:
            report = verify_export(path, model)
    return Export(folder, report)


def export_run(
    place: Path,
    folder: Path,
    *,
    network: Network | None = None,
    licence: str | None = None,
    verify: bool = True,
) -> Export:
    """Export from the latest checkpoint of a run's folder, or from one checkpoint.

    Args:
        place: a run's folder, or a `step-XXXXXXXX` folder in its `checkpoints`.
        folder: where to; replaced once the new export is complete.
        network: `auto`: the teacher if there is one; None: as the recipe says.
        licence: None: as the recipe says.

    Raises:
        ValueError: no checkpoint there, or it lacks the network that is asked for.
    """
    refuse_foreign(folder)
    tensors, state = checkpoint.load(_find(place))
    recipe = build_recipe(state["recipe"])
    which = _network(network or recipe.export.which, tensors)
    model = timm.create_model(state["timm"]["architecture"], num_classes=0, **state["timm"]["args"])
    model.load_state_dict(_below(tensors, f"model.{which}.model."))
    mean, std = state["mean_std"]
    return export_encoder(
        model,
        folder,
        input_size=(recipe.data.channels, *recipe.native_size),
        mean=mean,
        std=std,
        licence=licence or recipe.export.licence,
        heads=_below(tensors, "model.objectives."),
        verify=verify,
        card=facts_of(
            recipe,
            network=which,
            step=state["step"],
            steps_per_epoch=state["steps_per_epoch"],
            images=state.get("images"),
            seconds=state["seconds"],
            hardware=state.get("hardware"),
            probe=probe_of(state["outcome"], which),
            kept=kept_of(state["outcome"], which),
        ),
    )


def recipe_of(model: Any) -> dict[str, Any]:
    """How timm builds `model` again, for the state of a checkpoint: the weights that a run started from may be gone."""
    args = {name: value for name, value in model._model_args.items() if name not in ("num_classes", "drop_path_rate")}
    return {"architecture": model.pretrained_cfg["architecture"], "args": args}


def probe_of(numbers: Mapping[str, float], network: str) -> dict[str, float]:
    """A run's k-NN numbers as the card names them."""
    names = {network: "this encoder", "before training": "before training", "raw pixels": "raw pixels"}
    return {text: numbers[name] for name, text in names.items() if name in numbers}


def kept_of(numbers: Mapping[str, float], network: str) -> dict[str, float]:
    """How like the start's a network's features still are, as the card names it; empty for runs from random weights."""
    names = {f"{network} start_cosine": "cosine", f"{network} start_cka": "linear CKA"}
    return {text: numbers[name] for name, text in names.items() if name in numbers}


def _find(place: Path) -> Path:
    if (place / "manifest.json").is_file():
        return place
    found = checkpoint.latest(place / "checkpoints")
    if found is None:
        raise ValueError(f"{place} holds no checkpoint: give a run's folder, or a step-XXXXXXXX folder")
    return found


def _network(wanted: str, tensors: Mapping[str, Any]) -> str:
    present = [net for net in ("teacher", "student") if any(name.startswith(f"model.{net}.") for name in tensors)]
    if wanted == "auto" and present:
        return present[0]
    if wanted not in present:
        raise ValueError(f"the checkpoint holds no {wanted} encoder; there is: {', '.join(present) or 'none'}")
    return wanted


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
