"""A tokenizer as a folder: `model.safetensors`, and `config.json` with its settings and the hash of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from .base import Tokenizer, TokenizerSettings
from .dvae import DVAE, DVAESettings
from .vq import VQ, VQSettings

WEIGHTS, CONFIG = "model.safetensors", "config.json"
KINDS: dict[str, type[TokenizerSettings]] = {"vq": VQSettings, "dvae": DVAESettings}
HOW_TO_TRAIN = "train one: hybrid-ssl tokenizer --source ./images --out ./tokenizer"


def build_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """An untrained tokenizer; its weights come from torch's current random state."""
    if isinstance(settings, DVAESettings):
        return DVAE(settings)
    assert isinstance(settings, VQSettings), settings
    return VQ(settings)


def save_tokenizer(folder: Path, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> str:
    """Write weights and settings into an existing folder; returns the sha256 of the weights.

    Args:
        facts: more that `config.json` shall say (data, steps, measures), for people only.
    """
    save_model(tokenizer, str(folder / WEIGHTS))
    digest = file_hash(folder / WEIGHTS)
    config = {"tokenizer": tokenizer.settings.model_dump(mode="json"), "sha256": digest, **facts}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return digest


def load_tokenizer(folder: str | Path, sha256: str | None = None) -> tuple[Tokenizer, str]:
    """The frozen tokenizer of a folder, in `eval`, and the sha256 of its weights.

    Args:
        sha256: what the weights have to be; its first 8 digits or more are enough.

    Raises:
        ValueError: there is no tokenizer, it is damaged, or it is another one.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        digest = file_hash(folder / WEIGHTS)
    except OSError as error:
        raise ValueError(f"there is no tokenizer in {str(folder)!r} ({error.strerror}); {HOW_TO_TRAIN}") from error
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is no JSON: {error}; {HOW_TO_TRAIN}") from error
    if digest != config.get("sha256"):
        raise ValueError(f"{folder / WEIGHTS} is damaged: its sha256 is {digest}, {CONFIG} says {config.get('sha256')}")
    if sha256 is not None and not (len(sha256) >= 8 and digest.startswith(sha256.lower())):
        raise ValueError(f"the tokenizer in {str(folder)!r} has the sha256 {digest}, not {sha256}")
    return _restore(folder, config.get("tokenizer")), digest


def _restore(folder: Path, stored: Any) -> Tokenizer:
    kind = stored.get("kind") if isinstance(stored, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{folder / CONFIG}: a tokenizer's kind is one of {', '.join(KINDS)}, not {kind!r}")
    try:
        tokenizer = build_tokenizer(KINDS[kind].model_validate(stored))
        load_model(tokenizer, str(folder / WEIGHTS))
    except (ValidationError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    return tokenizer.requires_grad_(False).eval()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
