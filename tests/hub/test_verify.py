"""An export is checked by a fresh process: equal outputs pass, anything else is an error that says how far off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts
from hybrid_ssl.hub.verify import compare, verify_export


def vit(in_chans: int = 3) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        depth=1,
        embed_dim=48,
        num_heads=3,
        img_size=64,
        reg_tokens=2,
        dynamic_img_size=True,
        in_chans=in_chans,
    )


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=0,
        depths=(1, 1, 1, 1),
        embed_dim=12,
        num_heads=(1, 1, 2, 2),
        window_size=2,
        img_size=64,
    )


def export(model: nn.Module, folder: Path, channels: int, verify: bool = True) -> str:
    done = export_encoder(
        model,
        folder,
        input_size=(channels, 64, 64),
        mean=[0.3] * channels,
        std=[0.2] * channels,
        card=CardFacts(),
        verify=verify,
    )
    return str(done.report)


@pytest.mark.parametrize(("make", "channels"), [(vit, 3), (lambda: vit(4), 4), (swin, 3)], ids=["vit", "vit4", "swin"])
def test_fresh_process_gets_equal_outputs(make: Callable[[], nn.Module], channels: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report = export(make(), tmp_path / "out", channels)
    assert f"timm {timm.__version__}: equal outputs (tokens, pooled)" in report
    assert "transformers 5" in report or "transformers 4" in report
    assert report.count("equal outputs") == 2
    assert ("image processor: right size" in report) == (channels == 3)


def test_missing_transformers_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `transformers` that cannot be found: the fresh process runs with a finder that hides it."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'transformers' else find(name, package)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hide"))
    report = export(vit(), tmp_path / "out", 3)
    assert report.splitlines()[1:] == ["transformers: not installed, not checked"]


def test_other_weights_or_missing_files_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    export(model, tmp_path / "out", 3, verify=False)
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1e-3}, file)
    with pytest.raises(ValueError, match="other outputs than the trained encoder: timm .*differ by up to 0.001"):
        verify_export(tmp_path / "out", model)
    file.unlink()
    with pytest.raises(ValueError, match="does not load in a fresh process"):
        verify_export(tmp_path / "out", model)


def test_a_failed_check_keeps_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(vit(), tmp_path / "out", 3, verify=False)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def refuse(folder: Path, model: nn.Module) -> None:
        raise ValueError("not equal")

    monkeypatch.setattr("hybrid_ssl.hub.export.verify_export", refuse)
    with pytest.raises(ValueError, match="not equal"):
        export(vit(), tmp_path / "out", 3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_comparison_names_shapes_and_differences() -> None:
    expected = {"pooled": torch.zeros(2, 3)}
    assert compare(expected, {"pooled": torch.zeros(2, 3)})["equal"]
    assert compare(expected, {"pooled": torch.zeros(2, 4)})["text"] == "pooled (2, 4) instead of (2, 3)"
    assert "differ by up to 0.5" in compare(expected, {"pooled": torch.full((2, 3), 0.5)})["text"]
    assert not compare({"pooled": torch.tensor([torch.nan])}, {"pooled": torch.tensor([torch.nan])})["equal"]
