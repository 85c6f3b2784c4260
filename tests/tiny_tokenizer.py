"""A tokenizer of a few kilobytes for tests: untrained, but its ids depend on the picture."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from hybrid_ssl.tokenizer.files import build_tokenizer, save_tokenizer
from hybrid_ssl.tokenizer.vq import VQSettings


def write_tokenizer(folder: Path, *, stride: int = 8, channels: int = 3, codes: int = 8, seed: int = 0) -> str:
    """Save one into an existing folder; returns its hash."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(VQSettings(channels=channels, stride=stride, codes=codes, dim=4, width=8)).train()
        for _ in range(20):  # the statistics by which features are standardised
            tokenizer.score(torch.rand(4, channels, 4 * stride, 4 * stride))
    return save_tokenizer(folder, tokenizer, {})


@cache
def shared_tokenizer() -> str:
    """Folder of one for the whole process, removed at its end."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    write_tokenizer(Path(_FOLDERS[-1].name))
    return _FOLDERS[-1].name


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
