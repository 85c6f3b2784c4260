"""Fine-tuned classification after MAE (arXiv 2111.06377), BEiT (2106.08254) and SimMIM (2111.09886).

Accuracies are counted in integers per class and summed over processes, so they are the same with any number of them.
Shapes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...data.decode import Decoder
from ..encoders import open_encoder
from ..task import Batch, Task
from .augment import Augment
from .export import FOLDER, export_classifier
from .mix import mix, soft
from .model import Classifier, add_head
from .picture import answer_sheet
from .samples import LabelledImages, open_parts
from .settings import ClassificationRecipe

_SHOWN = 24  # test images on the picture
_TOP5_FROM = 6  # classes


class ClassificationTask(Task):
    """See `Task`. The model is a timm model with its own head, as `model.encoder`."""

    kind = "classification"
    headline = "top1"
    recipe: ClassificationRecipe
    model: Classifier

    def __init__(self, recipe: ClassificationRecipe) -> None:
        self.recipe, data = recipe, recipe.data
        parts = open_parts(data)
        self.classes, self.problems = parts.classes, parts.problems
        seed, size = recipe.run.seed, data.height_width
        more: dict[str, Any] = {} if data.channels is None else {"in_chans": data.channels}
        opened = open_encoder(recipe.encoder, size=size, seed=seed, **more)
        frozen = recipe.encoder.frozen
        rate = 0.0 if frozen else recipe.encoder.drop_path  # noise in features that learn nothing from it
        encoder: Any
        encoder, self._again = add_head(opened, recipe.head, len(self.classes), drop_path=rate, seed=seed)
        if frozen:
            encoder.requires_grad_(False)
            encoder.get_classifier().requires_grad_(True)
        self.mean, self.std = opened.mean, opened.std
        span = (data.value_range[0], data.value_range[1]) if data.value_range else None
        self.model = Classifier(encoder, self.classes, self.mean, self.std, size, data.crop, span)
        decode = Decoder(len(self.mean), span, data.max_megapixels)
        augment = Augment(recipe.augment, size, self.mean, self.std)
        self.parts = parts
        self.train, self.test = (
            LabelledImages(*part, decode, size, data.crop, augment) for part in (parts.train, parts.test)
        )
        self.confusion: Tensor | None = None
        """int64 [K, K] of the last `evaluate`: truth, answer"""

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """uint8 [B, C, H, W] and int64 [B]."""
        return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])

    def mix(self, images: Tensor, targets: Tensor, rng: Random) -> tuple[Tensor, Tensor]:
        """int64 [B] -> float [B, K], smoothed and mixed."""
        return mix(self.recipe.mix, images, soft(targets, len(self.classes), self.recipe.label_smoothing), rng)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
        """`top1`, `top5` if there are more than 5 classes, `mean_class`, and `class/NAME` for each that was tested."""
        count = len(self.classes)
        confusion = torch.zeros(count, count, dtype=torch.int64, device=accelerator.device)
        near = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        for batch in batches:
            best = model(batch.images).topk(min(5, count)).indices  # [B, 5]
            near += (best == batch.targets[:, None]).any(1).sum()
            pairs = batch.targets * count + best[:, 0]
            confusion += torch.bincount(pairs, minlength=count * count).view(count, count)
        confusion, near = (accelerator.reduce(part, reduction="sum") for part in (confusion, near))
        self.confusion = confusion.cpu()
        tested, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        shares = {name: r / n for name, r, n in zip(self.classes, right, tested, strict=True) if n}
        total = max(1, sum(tested))
        top5 = {"top5": int(near) / total} if count >= _TOP5_FROM else {}
        mean = {"mean_class": sum(shares.values()) / max(1, len(shares))}
        return {"top1": sum(right) / total} | top5 | mean | {f"class/{name}": share for name, share in shares.items()}

    def config(self) -> dict[str, Any]:
        data = self.recipe.data
        return {
            "classes": self.classes,
            "size": list(data.height_width),
            "crop": data.crop,
            "value_range": data.value_range,
            "mean": self.mean,
            "std": self.std,
            "encoder": self._again,
        }

    def draw(self, model: nn.Module, path: Path) -> None:
        """Test images with answer and truth, and the confusion of the last evaluation, as a PNG."""
        images, labels = [], []
        for i in torch.linspace(0, len(self.test) - 1, min(_SHOWN, len(self.test))).round().long().tolist():
            try:
                image, label = self.test.read(i, None)
            except ValueError:
                continue  # the loader counts and names it
            images.append(image)
            labels.append(label)
        pictures = torch.stack(images)
        with torch.no_grad():
            device = next(model.parameters()).device
            probabilities = model(pictures.to(device)).softmax(1).cpu()
        answer_sheet(pictures, labels, probabilities, self.classes, self.confusion).save(path)

    def export(self, model: nn.Module, out: Path, metrics: Mapping[str, float]) -> str:
        """Write `out/classifier` for timm and transformers."""
        assert isinstance(model, Classifier)
        done = export_classifier(model, out / FOLDER, self.recipe, images=len(self.train), metrics=metrics)
        report = f"; {done.report}" if done.report else ""
        return f"for others: timm.create_model('local-dir:{done.folder}', pretrained=True){report}"

    def facts(self) -> dict[str, Any]:
        parts = {"train": self.parts.train, "test": self.parts.test}
        return {
            "classes": len(self.classes),
            "images": {name: len(part.rows) for name, part in parts.items()},
            "fingerprint": "/".join(f"{part.source.fingerprint}-{len(part.rows)}" for part in parts.values()),
            "problems": self.problems,
        }
