"""The pictures of a run: views.png, reconstruction_LABEL.png, curves.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import Recipe
from .monitor.curves import curves
from .monitor.log import METRICS
from .monitor.pictures import as_pictures, reconstruction_sheet, view_sheet
from .plan import Batch
from .pretrainer import Pretrainer
from .schedule import Progress

IMAGES = 8


def draw_views(recipe: Recipe, pretrainer: Pretrainer, batch: Batch, out: Path) -> None:
    """What the encoder really sees: every crop of some images, and what the masks hide of them."""
    spec = pretrainer.spec
    masks: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for name, mask in recipe.masks.items():
        if name not in batch.masks:
            continue
        over = [mask.view, *getattr(mask, "beside", [])]  # a part of the mask for each modality
        for view, part in zip(over, batch.masks[name].chunk(len(over), dim=1), strict=True):
            title = name if view == mask.view else f"{name}, {view}"
            masks[title], places[title] = part, view
    views = {name: as_pictures(view) for name, view in batch.views.items()}
    view_sheet(views, spec.crops, masks, places, spec.grids, images=IMAGES).save(out / "views.png")


def draw_reconstructions(recipe: Recipe, pretrainer: Pretrainer, batch: Batch, now: Progress, out: Path) -> None:
    """What objectives that predict pixels make of the hidden patches, one sheet for each."""
    able: dict[str, Any] = {label: part for label, part in pretrainer.parts.items() if hasattr(part, "reconstruct")}
    if not able:
        return
    device = pretrainer.mean.device
    moved = batch._replace(
        views={name: view.to(device) for name, view in batch.views.items()},
        masks={name: mask.to(device) for name, mask in batch.masks.items()},
        hidden=None,
    )
    pretrainer.eval()
    with torch.no_grad():
        ready, tokens = pretrainer.encode(moved, now)
        for label, part in able.items():
            view, mask = part.needs[0].view, part.needs[0].mask
            assert mask is not None
            hidden = batch.masks[mask][:, : pretrainer.spec.tokens(view)]  # other modalities come behind the images
            predicted = part.reconstruct(tokens, ready) * pretrainer.std + pretrainer.mean  # back to 0..255
            sheet = reconstruction_sheet(
                batch.views[view], hidden, predicted.cpu() / 255, pretrainer.spec.grids[view], images=IMAGES
            )
            sheet.save(out / f"reconstruction_{label}.png")
    pretrainer.train()


def draw_curves(out: Path) -> None:
    """Losses and probe results so far."""
    try:
        curves(out / METRICS).save(out / "curves.png")
    except ValueError:
        return  # nothing recorded yet
