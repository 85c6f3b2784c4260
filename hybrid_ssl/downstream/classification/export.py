"""The fine-tuned classifier as timm and transformers load it: the encoder's format, with class names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from ...hub.export import Export, export_encoder
from ...hub.facts import CardFacts
from .model import Classifier
from .settings import ClassificationRecipe

FOLDER = "classifier"


def export_classifier(
    model: Classifier, folder: Path, recipe: ClassificationRecipe, *, images: int, metrics: Mapping[str, float]
) -> Export:
    """Write `folder`, which `timm.create_model('local-dir:FOLDER', pretrained=True)` loads.

    Args:
        images: that it was trained on.
        metrics: of `ClassificationTask.evaluate`, for the card.

    Raises:
        ValueError: it is not finite, or does not give equal outputs in a fresh process.
        StorageError: the disk refuses.
    """
    encoder: Any = model.encoder
    mean, std = (values.flatten().tolist() for values in (model.normalise.mean, model.normalise.std))
    source, cfg = recipe.data.source, recipe.encoder
    card = CardFacts(
        title=f"{encoder.pretrained_cfg['architecture']} fine-tuned for {len(model.classes)} classes",
        data=[source] if isinstance(source, str) else list(source),
        images=images,
        batch_size=recipe.run.batch_size,
        probe={"the test images": metrics["top1"]},
        probe_name="top-1 accuracy",
        base_model=None if cfg.random else _hub_name(cfg.name),
        recipe=recipe.model_dump(mode="json", exclude={"encoder": {"name"}, "run": {"out"}}),
    )
    return export_encoder(
        encoder,
        folder,
        input_size=(len(mean), *model.size),
        mean=mean,
        std=std,
        card=card,
        licence=recipe.export.licence,
        labels=model.classes,
        crop_pct=model.crop,
        verify=recipe.export.verify,
    )


def _hub_name(name: str) -> str:
    """What the Hub calls the weights that were fine-tuned, or the folder that they came from."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    return f"timm/{name}" if timm.is_model(name.split(".")[0]) and not Path(name).exists() else name
