"""`hybrid-ssl evaluate`: open encoder and data, one pass for all protocols, a table and `results.json` for each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...config import RunSettings
from ...data.decode import Decoder
from ...encoder.base import mean_std
from ...engine import hardware, launch
from ...hub.facts import is_public
from ...hub.load import load_encoder
from ...nn.distributed import rank
from ..classification.augment import Augment
from ..classification.samples import LabelledImages, Parts, open_parts
from ..classification.settings import AugmentSettings, two_sides
from ..results import encoded, write_results
from . import attentive, knn, linear, logistic, lowshot, retrieval
from .embed import Embedder, Part
from .features import SPLITS, Pass, Say, features
from .feed import Feed, Live, Stored
from .images import Blocks
from .settings import EvaluateRecipe, Protocol
from .work import Bench, Found

_TOKENS: tuple[Part, ...] = ("tokens",)


class Opened(NamedTuple):
    """The encoder with what it expects."""

    model: nn.Module
    size: tuple[int, int]
    channels: int
    crop: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that protocols need, after the pass."""

    recipe: EvaluateRecipe
    opened: Opened
    parts: Parts
    how: Pass
    bench: Bench

    def live(self, split: str, wanted: Collection[Part], crops: bool = False) -> Live:
        """The encoder itself over a split, on centre crops or on random ones."""
        rows = (self.bench.train if split == "train" else self.bench.test).rows
        blocks = Blocks(self.how.splits[split], self.how.shape, pixels=False)
        seed = self.recipe.run.seed if crops else None
        return Live(self.how.embedder, blocks, rows, wanted, self.how.workers, seed)

    def tokens(self, split: str) -> Feed:
        """Patch tokens of centre crops: from memory if they are there."""
        part = self.bench.train if split == "train" else self.bench.test
        stored = "tokens" in part.features
        return Stored(part, _TOKENS, self.bench.device) if stored else self.live(split, _TOKENS)


def evaluate(recipe: EvaluateRecipe) -> dict[Protocol, Found]:
    """Run all protocols of the recipe, print their numbers and write `OUT/PROTOCOL/results.json`.

    Raises:
        ValueError: encoder or data are not there or do not fit.
    """
    run = recipe.run
    accelerator = launch(
        RunSettings(length="1 steps", batch_size=1, out=run.out, precision=run.precision, threads=run.threads)
    )
    say: Say = _print if rank() == 0 else _nothing
    started = time.perf_counter()
    work = _prepare(recipe, accelerator, say)
    images = f"{len(work.bench.train.labels):,} training and {len(work.bench.test.labels):,} test images"
    say(f"features of {images}: {time.perf_counter() - started:.1f} s")
    found = {}
    for protocol in dict.fromkeys(recipe.protocols):
        started = time.perf_counter()
        found[protocol] = _PROTOCOLS[protocol](work)
        seconds = time.perf_counter() - started
        say(table(protocol, found[protocol], seconds))
        if rank() == 0:
            _write(work, protocol, found[protocol], seconds, hardware(accelerator))
    say(f"results: {run.out}")
    return found


def table(protocol: str, found: Found, seconds: float) -> str:
    """The numbers of a protocol, one a line; an arrow shows the one that stands for all."""
    width = max(len(name) for name in found.metrics)
    lines = [f"{protocol} ({seconds:.1f} s)"]
    for name, value in found.metrics.items():
        number = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        lines.append(f"  {name:<{width}}  {number}{'  <-' if name == found.metric else ''}")
    lines += [f"  chosen {name}: {value}" for name, value in found.chosen.items()]
    return "\n".join(lines)


def _prepare(recipe: EvaluateRecipe, accelerator: Accelerator, say: Say) -> Evaluation:
    opened, parts = _open_encoder(recipe), open_parts(recipe.data)
    for problem in parts.problems:
        say(f"note: {problem}")
    how = _pass(recipe, opened, parts, accelerator.device, say)
    cache = Path(recipe.run.cache) if recipe.run.cache else Path(recipe.run.out) / "features"
    splits = features(how, _wanted(recipe, how), cache)
    bench = Bench(splits["train"], splits["test"], parts.classes, recipe.run.seed, accelerator.device, say)
    return Evaluation(recipe, opened, parts, how, bench)


def _open_encoder(recipe: EvaluateRecipe) -> Opened:
    cfg, data = recipe.encoder, recipe.data
    if not cfg.name:
        raise ValueError("encoder.name is empty: give the encoder on the command line, a folder or a timm model name")
    size = None if data.size is None else two_sides(data.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = load_encoder(cfg.name, in_chans=data.channels, size=size, pretrained=not cfg.random)
    facts: dict[str, Any] = vars(model)["pretrained_cfg"]
    own = facts["input_size"]
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    crop = data.crop if data.crop is not None else float(facts.get("crop_pct") or 1.0)
    return Opened(model, size or (int(own[-2]), int(own[-1])), channels, crop)


def _pass(recipe: EvaluateRecipe, opened: Opened, parts: Parts, device: torch.device, say: Say) -> Pass:
    run, data = recipe.run, recipe.data
    mean, std = mean_std(opened.model)
    embedder = Embedder(opened.model, mean, std, pooling=recipe.encoder.pooling, precision=run.precision, device=device)
    span = None if data.value_range is None else (data.value_range[0], data.value_range[1])
    decoder = Decoder(opened.channels, span, data.max_megapixels)
    crops = AugmentSettings(scale=recipe.crops.scale, hflip=recipe.crops.hflip, rand_augment=None, erase=0.0)
    augment = Augment(crops, opened.size, mean, std)
    samples = {
        split: LabelledImages(part.source, part.rows, part.labels, decoder, opened.size, opened.crop, augment)
        for split, part in zip(SPLITS, (parts.train, parts.test), strict=True)
    }
    facts = {
        "images": [[part.source.fingerprint, _digest(part.rows)] for part in (parts.train, parts.test)],
        "crop": opened.crop,
        "value_range": data.value_range,
        "max_megapixels": data.max_megapixels,
    }
    shape = (opened.channels, *opened.size)
    return Pass(embedder, samples, shape, run.batch_size, run.workers, run.max_broken, facts, say)


def _wanted(recipe: EvaluateRecipe, how: Pass) -> set[Part]:
    """What the protocols read; patch tokens only if they fit into memory."""
    wanted: set[Part] = {"pooled"}
    if "knn" in recipe.protocols and recipe.knn.raw_pixels:
        wanted.add("pixels")
    if "linear" in recipe.protocols and "sweep" in recipe.linear.kinds:
        wanted.add("blocks")
    if "attentive" in recipe.protocols:
        images = sum(len(samples) for samples in how.splits.values())
        size = 4 * images * _one(how, "tokens").numel() / 1e9
        if size <= recipe.attentive.memory:
            wanted.add("tokens")
        else:
            how.say(
                f"patch tokens would take {size:.1f} GB (attentive.memory): the encoder runs in every epoch instead"
            )
    return wanted


def _one(how: Pass, part: Part) -> Tensor:
    """A part of the features of one image, to see its shape."""
    return how.embedder(torch.zeros(1, *how.shape, dtype=torch.uint8), (part,))[part][0]


def _linear(work: Evaluation) -> Found:
    live = work.live("train", ("pooled", "blocks"), crops=True)
    return linear.run(work.bench, work.recipe.linear, live)


def _attentive(work: Evaluation) -> Found:
    cfg, centre = work.recipe.attentive, work.tokens("train")
    learn = work.live("train", _TOKENS, crops=True) if cfg.augment else centre
    width = _one(work.how, "tokens").shape[-1]
    return attentive.run(work.bench, cfg, width, (learn, centre, work.tokens("test")))


_PROTOCOLS: Mapping[Protocol, Callable[[Evaluation], Found]] = {
    "knn": lambda work: knn.run(work.bench, work.recipe.knn),
    "linear": _linear,
    "logistic": lambda work: logistic.run(work.bench, work.recipe.logistic),
    "lowshot": lambda work: lowshot.run(work.bench, work.recipe.lowshot, work.recipe.logistic),
    "retrieval": lambda work: retrieval.run(work.bench, work.recipe.retrieval),
    "attentive": _attentive,
}


def _write(work: Evaluation, protocol: Protocol, found: Found, seconds: float, machine: str) -> None:
    recipe, bench, parts = work.recipe, work.bench, work.parts
    folder, source = Path(recipe.run.out) / protocol, recipe.data.source
    broken = sum(len(part.rows) for part in (parts.train, parts.test)) - len(bench.train.rows) - len(bench.test.rows)
    settings = {"pooling": recipe.encoder.pooling, "precision": recipe.run.precision}
    write_results(
        folder,
        task=protocol,
        metric=found.metric,
        metrics=found.metrics,
        encoder=encoded(recipe.encoder.name, work.opened.model, recipe.encoder.random),
        data={
            "source": source if isinstance(source, str) and is_public(source) else "local images",
            "images": {"train": len(bench.train.labels), "test": len(bench.test.labels)},
            "classes": len(bench.classes),
            "broken": broken,
            "size": list(work.opened.size),
            "channels": work.opened.channels,
            "crop": work.opened.crop,
            "problems": parts.problems,
        },
        seed=recipe.run.seed,
        seconds=seconds,
        hardware=machine,
        chosen=found.chosen,
        settings=settings | getattr(recipe, protocol).model_dump(mode="json"),
    )
    if protocol == "lowshot":
        rows = parts.train.rows[bench.train.rows]
        lowshot.write_draws(folder, bench.train.labels, rows, parts.train.source, recipe.lowshot)


def _digest(rows: Tensor) -> str:
    """Which images of a source are used, in few letters."""
    return hashlib.blake2b(rows.numpy().tobytes(), digest_size=8).hexdigest()


def _print(text: str) -> None:
    print(text, flush=True)


def _nothing(text: str) -> None:
    """What processes other than the first one say."""
