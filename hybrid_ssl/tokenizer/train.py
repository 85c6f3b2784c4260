"""Train a tokenizer on one's own pictures: one process, one device, pictures as the loader of pretraining makes them.

Every interval prints what tells a good tokenizer from a useless one, and writes the folder anew: the codes' perplexity
(how many codes would be in use if all in use were used alike; a quarter of them is a fair aim), how many are used at
all, and the reconstruction's PSNR, with a sheet of pictures. A run is a function of its settings: order, crops and
noise are keyed by (seed, step).

Shapes: B images, K codes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..data.loader import Loader
from ..data.order import key
from ..data.settings import DataSettings, ViewSettings
from ..data.sources import open_source
from ..monitor.pictures import Column, sheet
from ..schedule import Progress, Ramp, Value, value_at
from ..settings import Settings
from ..storage import publish
from .base import Tokenizer
from .dvae import DVAESettings
from .files import build_tokenizer, save_tokenizer
from .vq import VQSettings

SHEET, LOG = "reconstruction.png", "log.jsonl"


class TrainingSettings(Settings):
    """Everything that decides a tokenizer."""

    data: DataSettings
    view: ViewSettings = ViewSettings(size=112, scale=[0.08, 1.0])
    """one crop; size and scale of the view that the objective will read"""
    model: Annotated[VQSettings | DVAESettings, Field(discriminator="kind")]
    out: str
    steps: int = Field(20_000, ge=1)
    batch_size: int = Field(128, ge=1)
    lr: Value = Ramp(start=1e-3, end=1e-5, shape="cosine")
    """AdamW's, without weight decay"""
    seed: int = Field(0, ge=0)
    workers: int = Field(2, ge=0)
    log_every: int = Field(500, ge=1)
    """steps between two lines, each of which also writes the folder"""
    device: str = "auto"
    """`auto`: a GPU if there is one"""


def train_tokenizer(cfg: TrainingSettings, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and write `cfg.out`; returns the last interval's measures and the `sha256` of the weights.

    Raises:
        ValueError: settings that do not go together, or data that cannot be read.
    """
    if cfg.model.channels != cfg.data.channels:
        raise ValueError(f"the tokenizer has {cfg.model.channels} channels, the pictures have {cfg.data.channels}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
    torch.manual_seed(cfg.seed)  # the initial weights; the steps have generators of their own
    tokenizer = build_tokenizer(cfg.model).to(device)
    tokenizer.grid(*cfg.view.height_width)
    loader = _loader(cfg)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
    report(f"{cfg.model.kind} tokenizer, {sum(p.numel() for p in trained) / 1e6:.1f} million parameters, on {device}")
    counts, losses, began = torch.zeros(cfg.model.codes, device=device), [], time.perf_counter()
    lines: list[dict[str, Any]] = []
    for step, batch in zip(range(cfg.steps), loader.iterate(), strict=False):
        now = Progress(step, cfg.steps, loader.steps_per_epoch, cfg.seed)
        images = batch.views["image"].to(device, non_blocking=True).float() / 255
        loss, ids = _step(tokenizer, optimizer, images, now, value_at(cfg.lr, now))
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
        losses.append(loss)
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            speed = len(losses) * cfg.batch_size / (time.perf_counter() - began)
            tokenizer.eval()
            shown = {"step": step + 1, "loss": torch.stack(losses).mean().item(), **measure(tokenizer, images, counts)}
            report(_sentence(shown, cfg, speed))
            lines.append(shown)
            digest = _write(cfg, tokenizer, images, lines)
            tokenizer.train()
            counts.zero_()
            losses, began = [], time.perf_counter()
    report(f"written to {cfg.out}, sha256 {digest[:12]}")
    return {**lines[-1], "sha256": digest}


def _step(
    tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, images: Tensor, now: Progress, lr: float
) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(key(now.seed, 0, now.step, "tokenizer"))
    loss, ids = tokenizer.loss(images, now, draw)
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return loss.detach(), ids


@torch.no_grad()
def measure(tokenizer: Tokenizer, images: Tensor, counts: Tensor) -> dict[str, float]:
    """Perplexity and number of used codes after `counts` [K]; PSNR in dB of `images` [B, C, H, W] from their ids."""
    error = F.mse_loss(reconstruct(tokenizer, images), images).item()
    return {
        "perplexity": perplexity(counts),
        "used_codes": int((counts > 0).sum()),
        "psnr": -10 * math.log10(max(error, 1e-10)),
    }


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of a histogram [K]: K when all are equal, 1 when all is in one."""
    share = counts.double() / counts.sum().clamp(min=1)
    return math.exp(torch.special.entr(share).sum().item())


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """[B, C, H, W] in 0..1 -> the pictures that their ids stand for."""
    return tokenizer.decode(tokenizer.ids(images), tokenizer.grid(*images.shape[-2:]))


def _loader(cfg: TrainingSettings) -> Loader:
    if cfg.view.crops != 1:
        raise ValueError(f"a tokenizer reads one crop of each picture: view.crops is {cfg.view.crops}, set it to 1")
    return Loader(
        open_source(cfg.data),
        cfg.data,
        {"image": cfg.view},
        {},
        grids={},
        stride=1,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        workers=cfg.workers,
        total_steps=cfg.steps,
        pin_memory=torch.cuda.is_available(),
    )


def _write(cfg: TrainingSettings, tokenizer: Tokenizer, images: Tensor, lines: list[dict[str, Any]]) -> str:
    facts = {"measures": lines[-1], "training": cfg.model_dump(mode="json")}
    with publish(Path(cfg.out)) as folder:
        digest = save_tokenizer(folder, tokenizer, facts)
        (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        draw_sheet(tokenizer, images[:16], f"{lines[-1]['psnr']:.1f} dB").save(folder / SHEET)
    return digest


def draw_sheet(tokenizer: Tokenizer, images: Tensor, note: str) -> Any:
    """Pictures [B, C, H, W] in 0..1 beside what their ids stand for, as a PIL image."""
    both = [(x.cpu() * 255).round().to(torch.uint8) for x in (images, reconstruct(tokenizer, images))]
    size = f"{images.shape[3]} x {images.shape[2]}"
    columns = [Column("picture", size, both[0]), Column("from its ids", note, both[1])]
    return sheet(columns, images=16, cell=112, blocks=4 if len(images) > 8 else 1)


def _sentence(shown: dict[str, Any], cfg: TrainingSettings, speed: float) -> str:
    codes = cfg.model.codes
    return (
        f"step {shown['step']}/{cfg.steps}  loss {shown['loss']:.5f}  perplexity {shown['perplexity']:.0f} of {codes} "
        f"({shown['perplexity'] / codes:.0%})  used codes {shown['used_codes']}  PSNR {shown['psnr']:.1f} dB  "
        f"{speed:.0f} images/s"
    )
