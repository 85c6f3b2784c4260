"""Semantic segmentation as a task: data in any layout, an encoder with a head, mIoU, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...data.decode import Decoder
from ..encoders import open_encoder
from ..task import Batch, Task
from .augment import Augment
from .check import disagreements, infer_classes, look, shortened, sift
from .drawing import comparison
from .labels import Labels, ignored_ids, known_classes
from .layouts import Chosen, Layout, open_layout
from .metrics import Confusion, measures
from .model import Segmenter
from .samples import SegmentationSamples
from .settings import SegmentationRecipe, SegmentationTest
from .sliding import Size

_DRAWN = 8  # test images on the sheet


class SegmentationTask(Task):
    """See `task.Task`. Targets are int16 [B, H, W]; in testing lists, where images differ in size."""

    kind: ClassVar[str] = "segmentation"
    headline: ClassVar[str] = "mIoU"
    recipe: SegmentationRecipe
    model: Segmenter
    train: SegmentationSamples
    test: SegmentationSamples

    def __init__(self, recipe: SegmentationRecipe) -> None:
        self.recipe, data = recipe, recipe.data
        span = (data.value_range[0], data.value_range[1]) if data.value_range else None
        self.decoder = Decoder(data.channels, span, data.max_megapixels)
        self.said: list[str] = []
        layout = open_layout(data)
        self.labels, pairs = self._look(layout)
        self.classes = self.labels.names
        size = recipe.augment.height_width
        self.opened = open_encoder(
            recipe.encoder, size=size, seed=recipe.run.seed, dynamic=True, in_chans=data.channels
        )
        window, stride = sliding_of(recipe.test, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.run.seed)  # the head's weights
            self.model = Segmenter(
                self.opened.model,
                self.opened.mean,
                self.opened.std,
                self.classes,
                recipe.model,
                window,
                stride,
                recipe.test.short_side or recipe.augment.short_side,
            )
        fill = [round(255 * mean) for mean in self.opened.mean]
        self.train = SegmentationSamples(pairs[0], self.decoder, self.labels, Augment(recipe.augment, fill))
        self.test = SegmentationSamples(pairs[1], self.decoder, self.labels)

    def collate(self, samples: Sequence[Any]) -> tuple[Any, Any]:
        """Stacked, or as lists where sizes differ."""
        images, targets = [image for image, _ in samples], [target for _, target in samples]
        if len({image.shape for image in images}) > 1:
            return images, targets
        return torch.stack(images), torch.stack(targets)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
        """`measures` of the whole test set: mIoU, accuracies, and each class' IoU, as shares of 1."""
        confusion = Confusion(len(self.classes), accelerator.device)
        with torch.inference_mode():
            for batch in batches:
                for found, target in zip(model(batch.images), batch.targets, strict=True):
                    confusion.add(found, target)
        return measures(confusion.total(), self.classes)

    def config(self) -> dict[str, Any]:
        return {
            "encoder": self.opened.again,
            "mean": self.opened.mean,
            "std": self.opened.std,
            "classes": self.classes,
            "model": self.recipe.model.model_dump(mode="json"),
            "window": self.model.window,
            "stride": self.model.stride,
            "short_side": self.model.short_side,
        }

    def draw(self, model: nn.Module, path: Path) -> None:
        """Image, truth and prediction of some test images, evenly spread over the list."""
        device = next(model.parameters()).device
        images: list[Tensor] = []
        truths: list[Tensor] = []
        count = min(_DRAWN, len(self.test))
        for i in (k * len(self.test) // count for k in range(count)):
            try:
                image, truth = self.test.read(i, None)
            except ValueError:  # counted where it is measured
                continue
            images.append(image)
            truths.append(truth)
        if images:
            with torch.inference_mode():
                found = [labels.cpu() for image in images for labels in model([image.to(device)])]
            comparison(images, truths, found, self.classes).save(path)

    def facts(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "training images": len(self.train),
            "test images": len(self.test),
            "classes": len(self.classes),
            "remarks": "; ".join(self.said),
            "fingerprint": f"{self.train.pairs.fingerprint}/{self.test.pairs.fingerprint}",
        }

    def _look(self, layout: Layout) -> tuple[Labels, list[Any]]:
        """Classes and usable pairs of both splits; what is odd goes into `said`."""
        data, limit = self.recipe.data, self.recipe.run.max_broken
        self.layout = layout.kind
        train = layout.train
        if data.limit is not None and data.limit < len(train):
            train = Chosen(train, [i * len(train) // data.limit for i in range(data.limit)])
        classes, origin = known_classes(data, layout)
        seen = look(train, self.decoder, None if classes is None else data.checked)
        ignore = ignored_ids(data, layout)
        if classes is None:
            classes, origin = infer_classes(seen, ignore), f"the ids in {len(seen.rows):,} training masks"
        labels = Labels(classes, ignore)
        self.said.append(f"classes from {origin}, ignored ids: {shortened(labels.ignore)}")
        seen_test = look(layout.test, self.decoder, data.checked)
        pairs = []
        for part, looked, split in ((train, seen, "train"), (layout.test, seen_test, "test")):
            usable, said = sift(part, looked, labels, split, limit)
            pairs.append(usable)
            self.said += said
        self.said += disagreements(seen, seen_test, labels)
        return labels, pairs


def sliding_of(cfg: SegmentationTest, crop: Size) -> tuple[Size | None, Size | None]:
    """Window and stride in pixels, or None for whole images; ValueError if windows would leave pixels out."""
    if cfg.mode == "whole":
        return None, None
    window = crop if cfg.crop is None else _pair(cfg.crop)
    stride = (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3)) if cfg.stride is None else _pair(cfg.stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"test.stride {stride} is more than the window {window} and leaves pixels out: lower it")
    return window, stride


def _pair(value: int | list[int]) -> Size:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
