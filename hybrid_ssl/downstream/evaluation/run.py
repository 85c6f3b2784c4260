"""`hybrid-ssl evaluate`: open encoder and data, one pass for all protocols, a table and `results.json` for each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ...config import RunSettings
from ...data.decode import Decoder
from ...encoder.base import mean_std
from ...engine import hardware, launch
from ...hub.facts import is_public
from ...hub.load import load_encoder
from ...nn.distributed import rank
from ..classification.augment import Augment
from ..classification.samples import LabelledImages, Parts, open_parts
from ..classification.settings import AugmentSettings
from ..results import encoded, write_results
from . import knn, logistic, lowshot, retrieval
from .embed import Embedder, Part
from .features import Pass, features
from .settings import EvaluateRecipe, Protocol
from .work import Bench, Found

_NEEDS: Mapping[Protocol, set[Part]] = {
    "knn": {"pooled"},
    "linear": {"pooled", "blocks"},
    "logistic": {"pooled"},
    "lowshot": {"pooled"},
    "retrieval": {"pooled"},
    "attentive": {"tokens"},
}


class Opened(NamedTuple):
    """The encoder with what it expects."""

    model: nn.Module
    size: tuple[int, int]
    channels: int
    crop: float


def evaluate(recipe: EvaluateRecipe) -> dict[Protocol, Found]:
    """Run all protocols of the recipe, print their numbers and write `OUT/PROTOCOL/results.json`.

    Raises:
        ValueError: encoder or data are not there or do not fit.
    """
    run = recipe.run
    accelerator = launch(
        RunSettings(length="1 steps", batch_size=1, out=run.out, precision=run.precision, threads=run.threads)
    )
    opened, parts = _open_encoder(recipe), open_parts(recipe.data)
    say = print if rank() == 0 else _nothing
    for problem in parts.problems:
        say(f"note: {problem}")
    started = time.perf_counter()
    bench, how = _measure(recipe, opened, parts, accelerator, say)
    spent = time.perf_counter() - started
    say(f"features of {len(bench.train.labels):,} training and {len(bench.test.labels):,} test images: {spent:.1f} s")
    found = {}
    for protocol in dict.fromkeys(recipe.protocols):
        started = time.perf_counter()
        found[protocol] = _PROTOCOLS[protocol](bench, recipe)
        seconds = time.perf_counter() - started
        say(table(protocol, found[protocol], seconds))
        if rank() == 0:
            folder = Path(run.out) / protocol
            _write(folder, protocol, found[protocol], recipe, opened, parts, bench, seconds, hardware(accelerator))
            if protocol == "lowshot":
                rows = parts.train.rows[bench.train.rows]
                lowshot.write_draws(folder, bench.train.labels, rows, parts.train.source, recipe.lowshot)
    return found


def table(protocol: str, found: Found, seconds: float) -> str:
    """The numbers of a protocol, one a line."""
    width = max(len(name) for name in found.metrics)
    lines = [f"{protocol} ({seconds:.1f} s)"]
    for name, value in found.metrics.items():
        mark = "  <-" if name == found.metric else ""
        lines.append(f"  {name:<{width}}  {value:g}{mark}" if value > 1 else f"  {name:<{width}}  {value:.4f}{mark}")
    lines += [f"  chosen: {name} {value}" for name, value in found.chosen.items() if not isinstance(value, dict)]
    return "\n".join(lines)


def _open_encoder(recipe: EvaluateRecipe) -> Opened:
    cfg, data = recipe.encoder, recipe.data
    if not cfg.name:
        raise ValueError("encoder.name is empty: give the encoder on the command line, a folder or a timm model name")
    size = None if data.size is None else data.height_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        model = load_encoder(cfg.name, in_chans=data.channels, size=size, pretrained=not cfg.random)
    facts: dict[str, Any] = vars(model)["pretrained_cfg"]
    own = facts["input_size"]
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    crop = data.crop if data.crop is not None else float(facts.get("crop_pct") or 1.0)
    return Opened(model, size or (int(own[-2]), int(own[-1])), channels, crop)


def _measure(
    recipe: EvaluateRecipe, opened: Opened, parts: Parts, accelerator: Accelerator, say: Callable[[str], None]
) -> tuple[Bench, Pass]:
    run, data = recipe.run, recipe.data
    span = None if data.value_range is None else (data.value_range[0], data.value_range[1])
    decoder = Decoder(opened.channels, span, data.max_megapixels)
    embedder = Embedder(
        opened.model,
        *mean_std(opened.model),
        pooling=recipe.encoder.pooling,
        precision=run.precision,
        device=accelerator.device,
    )
    crops = AugmentSettings(scale=recipe.crops.scale, hflip=recipe.crops.hflip, rand_augment=None, erase=0.0)
    augment = Augment(crops, opened.size, *mean_std(opened.model))
    samples = {
        name: LabelledImages(part.source, part.rows, part.labels, decoder, opened.size, opened.crop, augment)
        for name, part in (("train", parts.train), ("test", parts.test))
    }
    facts = {
        "train": [parts.train.source.fingerprint, _rows(parts.train.rows)],
        "test": [parts.test.source.fingerprint, _rows(parts.test.rows)],
        "crop": opened.crop,
        "value_range": data.value_range,
        "max_megapixels": data.max_megapixels,
    }
    how = Pass(
        embedder, samples, (opened.channels, *opened.size), run.batch_size, run.workers, run.max_broken, facts, say
    )
    wanted = set[Part]().union(*(_NEEDS[protocol] for protocol in recipe.protocols))
    if "knn" in recipe.protocols and recipe.knn.raw_pixels:
        wanted.add("pixels")
    cache = Path(run.cache) if run.cache else Path(run.out) / "features"
    splits = features(how, wanted, cache)
    bench = Bench(splits["train"], splits["test"], parts.classes, run.seed, accelerator.device, say)
    return bench, how


def _write(
    folder: Path,
    protocol: Protocol,
    found: Found,
    recipe: EvaluateRecipe,
    opened: Opened,
    parts: Parts,
    bench: Bench,
    seconds: float,
    machine: str,
) -> None:
    source = recipe.data.source
    settings = {name: getattr(recipe, name).model_dump(mode="json") for name in (protocol,)}
    write_results(
        folder,
        task=protocol,
        metric=found.metric,
        metrics=found.metrics,
        encoder=encoded(recipe.encoder.name, opened.model, recipe.encoder.random),
        data={
            "source": source if isinstance(source, str) and is_public(source) else "local images",
            "train": len(bench.train.labels),
            "test": len(bench.test.labels),
            "classes": len(bench.classes),
            "broken": len(parts.train.rows) + len(parts.test.rows) - len(bench.train.rows) - len(bench.test.rows),
            "size": list(opened.size),
            "channels": opened.channels,
            "crop": opened.crop,
            "problems": parts.problems,
        },
        seed=recipe.run.seed,
        seconds=seconds,
        hardware=machine,
        chosen=found.chosen,
        settings=settings | {"pooling": recipe.encoder.pooling, "precision": recipe.run.precision},
    )


_PROTOCOLS: Mapping[Protocol, Callable[[Bench, EvaluateRecipe], Found]] = {
    "knn": lambda bench, recipe: knn.run(bench, recipe.knn),
    "logistic": lambda bench, recipe: logistic.run(bench, recipe.logistic),
    "lowshot": lambda bench, recipe: lowshot.run(bench, recipe.lowshot, recipe.logistic),
    "retrieval": lambda bench, recipe: retrieval.run(bench, recipe.retrieval),
}


def _rows(rows: torch.Tensor) -> str:
    """Which images of a source are used, in few letters."""
    return hashlib.blake2b(rows.numpy().tobytes(), digest_size=8).hexdigest()


def _nothing(text: str) -> None:
    """What processes other than the first one say."""
