"""Detection and instance segmentation as a fine-tuning task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ...data.decode import Decoder
from ...hub.load import load_encoder
from ...monitor.pictures import Column, sheet
from ..encoders import Opened, open_encoder, rebuild, taps_of
from ..settings import FinetuneEncoder
from ..task import Batch, Task
from .augment import Objects
from .coco import Coco, read_coco
from .metrics import Found, average_precision
from .model import Detector, paste
from .pictures import draw_objects
from .pyramid import shown_at, unit_of
from .rle import encode, tools
from .samples import CocoSamples, find_images, find_split
from .settings import DetectionModel, DetectionRecipe

_SHOWN = 6  # test images of the picture
_SURE = 0.3  # score of what it shows: short trainings are not sure of much


class DetectionTask(Task):
    """Boxes, and masks with Mask R-CNN, from data in COCO's format.

    Raises:
        ValueError: data, encoder or recipe cannot be used; what to change.
    """

    kind: ClassVar[str] = "detection"
    headline: ClassVar[str] = "AP"
    recipe: DetectionRecipe
    model: Detector
    train: CocoSamples
    test: CocoSamples

    def __init__(self, recipe: DetectionRecipe) -> None:
        tools()
        self.recipe = recipe
        self.masks = recipe.model.kind == "mask_rcnn"
        places = {split: find_split(recipe.data, split) for split in ("train", "val")}
        train = read_coco(places["train"].annotations, masks=self.masks)
        test = read_coco(places["val"].annotations, masks=self.masks, classes=train.classes)
        self.classes = train.classes
        self.opened = _open(recipe)
        self.train = self._samples(self._wanted(train), find_images(recipe.data, places["train"], train, "train"))
        self.test = self._samples(test, find_images(recipe.data, places["val"], test, "val"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.run.seed)
            self.model = _build(self.opened.model, self.opened.mean, self.opened.std, self.classes, recipe.model)

    def _wanted(self, coco: Coco) -> Coco:
        """Training images, as `data.empty_images` and `data.limit` have it."""
        cfg = self.recipe.data
        numbers = [i for i in range(len(coco)) if cfg.empty_images or len(coco.of(i))][: cfg.limit]
        return coco if len(numbers) == len(coco) else coco.keep(numbers)

    def _samples(self, coco: Coco, folder: Path) -> CocoSamples:
        cfg = self.recipe.data
        span = (cfg.value_range[0], cfg.value_range[1]) if cfg.value_range else None
        decoder = Decoder(len(self.opened.mean), span, cfg.max_megapixels)
        return CocoSamples(coco, folder, decoder, self.recipe.augment, self.recipe.model.size, self.masks)

    def collate(self, samples: Sequence[tuple[Tensor, Objects]]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        return [image for image, _ in samples], [objects.target() for _, objects in samples]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
        found: list[tuple[int, Found]] = []
        for batch in batches:
            for i, each, image in zip(batch.ids, model(batch.images), batch.images, strict=True):
                found.append((i, _as_arrays(each, (image.shape[1], image.shape[2]))))
        if accelerator.num_processes > 1:
            found = gather_object(found)
        # matching 5,000 images takes a minute and gigabytes: one process does it for all
        numbers = [average_precision(self.test.coco, dict(found), self.masks)] if accelerator.is_main_process else [{}]
        if accelerator.num_processes > 1:
            broadcast_object_list(numbers)
        return numbers[0]

    def config(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "mean": self.opened.mean,
            "std": self.opened.std,
            "encoder": self.opened.again,
            "model": self.recipe.model.model_dump(mode="json"),
        }

    def draw(self, model: nn.Module, path: Path) -> None:
        readable = _readable(self.test, _SHOWN)
        columns: dict[str, list[Tensor]] = {"truth": [], "prediction": []}
        assert isinstance(model, Detector)
        for i, image in readable:
            truth = self.test.objects(i, masks=self.masks)
            columns["truth"].append(draw_objects(image, truth.boxes, truth.labels, self.classes, None, truth.masks))
            columns["prediction"].append(model.draw(image, model.predict(image), _SURE))
        notes = {"truth": f"{len(readable)} test images", "prediction": f"score {_SURE:g} and more"}
        pages = [Column(title, notes[title], _one_size(pictures)) for title, pictures in columns.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(pages, _SHOWN, cell=384, blocks=2).save(path)

    def facts(self) -> dict[str, Any]:
        out: dict[str, Any] = {"classes": len(self.classes)}
        for name, samples in (("training", self.train), ("test", self.test)):
            coco = samples.coco
            out[f"{name} images"] = len(coco)
            out[f"{name} objects"] = int((~coco.crowd).sum())
            if coco.crowd.any():
                out[f"{name} crowd regions"] = int(coco.crowd.sum())
            if coco.problems.counts:
                out[f"{name} problems"] = str(coco.problems)
        return out | {"fingerprint": f"{self.train.coco.fingerprint}/{self.test.coco.fingerprint}"}


def restore(config: Mapping[str, Any]) -> Detector:
    """The detector of `DetectionTask.config()`, with random weights."""
    cfg = DetectionModel.model_validate(config["model"])
    return _build(rebuild(config["encoder"]), config["mean"], config["std"], config["classes"], cfg)


def _build(
    encoder: nn.Module, mean: Sequence[float], std: Sequence[float], classes: Sequence[str], cfg: DetectionModel
) -> Detector:
    return Detector(encoder, taps_of(encoder), mean, std, classes, cfg)


def _open(recipe: DetectionRecipe) -> Opened:
    """The encoder for the square that all images are laid into; how large that is depends on the encoder's strides."""
    cfg = recipe.encoder
    if not cfg.name:
        raise ValueError("encoder.name is empty: give the encoder on the command line, a folder or a timm model name")
    with torch.device("meta"):
        taps = taps_of(load_encoder(cfg.name, pretrained=False))
    unit = unit_of(taps, recipe.model.strides)
    square = -(-recipe.model.size // unit) * unit
    side = round(square * shown_at(taps)[0])
    # positions for another size than that of the images are resampled in every pass
    return open_encoder(cfg, size=side, seed=recipe.run.seed, dynamic=_differs(cfg, side))


def _differs(cfg: FinetuneEncoder, side: int) -> bool:
    sides = [cfg.size] if isinstance(cfg.size, int) else cfg.size or [side]
    return any(given != side for given in sides)


def _as_arrays(each: Mapping[str, Tensor], size: tuple[int, int]) -> Found:
    masks = None
    if "masks" in each:
        masks = encode(paste(each["masks"], each["boxes"], size).to(torch.uint8).cpu().numpy())
    boxes, labels, scores = (each[name].float().cpu().numpy() for name in ("boxes", "labels", "scores"))
    return Found(boxes, labels.astype(int), scores, masks)


def _readable(samples: CocoSamples, count: int) -> list[tuple[int, Tensor]]:
    """The first images, spread over the list, that can be read."""
    out: list[tuple[int, Tensor]] = []
    for i in range(0, len(samples), max(1, len(samples) // count)):
        try:
            out.append((i, samples.read(i, None)[0]))
        except ValueError:  # it was named and counted when it was tested
            continue
    return out[:count]


def _one_size(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures [3, h, w] of several sizes on white squares: uint8 [n, 3, H, W]."""
    height, width = (max(picture.shape[side] for picture in pictures) for side in (1, 2))
    page = torch.full((len(pictures), 3, height, width), 255, dtype=torch.uint8)
    for row, picture in zip(page, pictures, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    return page
