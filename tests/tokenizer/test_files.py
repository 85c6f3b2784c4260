"""A tokenizer comes back to the bit, and anything else is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybrid_ssl.tokenizer.base import TokenizerSettings
from hybrid_ssl.tokenizer.dvae import DVAESettings
from hybrid_ssl.tokenizer.files import build_tokenizer, load_tokenizer, save_tokenizer
from hybrid_ssl.tokenizer.vq import VQSettings

VQ_SMALL = VQSettings(channels=1, stride=4, codes=8, dim=4, width=4)


def saved(folder: Path, settings: TokenizerSettings = VQ_SMALL) -> str:
    torch.manual_seed(0)
    return save_tokenizer(folder, build_tokenizer(settings), {"note": "for people"})


@pytest.mark.parametrize("settings", [VQ_SMALL, DVAESettings(channels=1, stride=2, codes=8, dim=4, width=4)])
def test_saved_tokenizer_comes_back_frozen_with_the_same_ids(tmp_path: Path, settings: TokenizerSettings) -> None:
    digest = saved(tmp_path, settings)
    torch.manual_seed(0)
    original = build_tokenizer(settings).eval()
    loaded, found = load_tokenizer(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    assert found == digest and loaded.settings == settings and not loaded.training
    assert torch.equal(loaded.ids(images), original.ids(images))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "for people"


def test_hash_picks_one_tokenizer(tmp_path: Path) -> None:
    digest = saved(tmp_path)
    for right in (digest, digest[:8], digest[:12].upper()):
        assert load_tokenizer(tmp_path, right)[1] == digest
    for wrong in ("0" * 64, digest[:4]):
        with pytest.raises(ValueError, match=f"has the sha256 {digest}, not {wrong}"):
            load_tokenizer(tmp_path, wrong)


def test_a_missing_folder_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="there is no tokenizer in .*nowhere.*; train one: hybrid-ssl tokenizer --source"
    ):
        load_tokenizer(tmp_path / "nowhere")


def test_damage_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its sha256 is"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "vae"}, "kind is one of vq, dvae, not 'vae'"),
        ({"codes": 9}, "cannot be read"),
        ({"x": 1}, "cannot be"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["tokenizer"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)
