"""An exported encoder of a few kilobytes for tests, in the place of weights that would be downloaded: untrained."""

import json
import tempfile
from functools import cache
from pathlib import Path

import timm
import torch

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts


def write_encoder(folder: Path, *, side: int = 64, channels: int = 3, seed: int = 0) -> None:
    """A ViT of another patch size, width and normalisation than the students of tests have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        args = {"patch_size": 32, "embed_dim": 36, "depth": 1, "num_heads": 3, "img_size": side, "in_chans": channels}
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **args).eval()
    normalised = {"mean": [0.5] * channels, "std": [0.2] * channels}
    card = CardFacts(title="a small encoder")
    export_encoder(model, folder, input_size=(channels, side, side), **normalised, card=card, verify=False)


@cache
def shared_start(name: str, *changes: str) -> str:
    """Folder of an export of timm's `name`, made small by `key=value` arguments: what a recipe's `init` would fetch."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name) / "encoder"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args = {key: json.loads(value) for key, value in (change.split("=") for change in changes)}
        model = timm.create_model(name, num_classes=0, img_size=112, dynamic_img_size=True, **args).eval()
    facts = {"mean": [0.5] * 3, "std": [0.2] * 3, "card": CardFacts(title="a small start")}
    export_encoder(model, folder, input_size=(3, 112, 112), **facts, verify=False)
    return str(folder)


@cache
def shared_encoder() -> str:
    """Folder of one for the whole process, removed at its end."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name) / "encoder"
    write_encoder(folder)
    return str(folder)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
