"""ONNX and torch.export: one file that computes what the encoder computes, at every batch and size that it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_ssl.hub.targets.dynamic import any_size, check
from hybrid_ssl.hub.targets.onnx import to_onnx
from hybrid_ssl.hub.targets.torch_export import to_torch_export

from .encoders import source

SWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 2), "window_size": 2}
FLEXIBLE: dict[str, Any] = {"dynamic_img_size": True, "reg_tokens": 2, "depth": 1}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"depth": 1},
    "vit_any_size": FLEXIBLE,
    "vit_no_class_token": {**FLEXIBLE, "class_token": False, "global_pool": "avg", "fc_norm": False, "channels": 4},
    "rotary": {"name": "vit_small_patch16_dinov3", "dynamic_img_size": True, "depth": 1},
    "swin": {"name": "swin_tiny_patch4_window7_224", **SWIN},
    "swinv2": {"name": "swinv2_tiny_window8_256", **SWIN},
}
SLOW = ("vit", "vit_no_class_token", "rotary", "swin", "swinv2")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ENCODERS]


@pytest.mark.parametrize("name", NAMES)
def test_onnx_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    encoder = source(**ENCODERS[name])
    lines = to_onnx(encoder, tmp_path / "out.onnx", True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert lines[0].startswith("onnxruntime: equal to torch within") and "any batch" in lines[1]
    properties = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert properties["mean"] == list(encoder.mean) and properties["license"] == "mit"
    session = runtime.InferenceSession(str(tmp_path / "out.onnx"))
    flexible = name in ("vit_any_size", "vit_no_class_token")
    assert any_size(encoder) is flexible and ("any multiple of 16" in lines[1]) is flexible
    images = torch.randn(5, encoder.size[0], *((96, 48) if flexible else (64, 64)))
    features, tokens = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = encoder.model.forward_features(images)
        torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(features), encoder.model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_exported_program_runs_without_timm(name: str, tmp_path: Path) -> None:
    encoder = source(**ENCODERS[name])
    lines = to_torch_export(encoder, tmp_path / "out.pt2", True)
    assert lines[0].startswith("equal to torch within")
    images = torch.randn(1, *encoder.size)
    torch.save(images, tmp_path / "images.pth")
    code = (
        "import sys, torch; sys.modules['timm'] = None\n"
        f"images = torch.load({str(tmp_path / 'images.pth')!r})\n"
        f"features, tokens = torch.export.load({str(tmp_path / 'out.pt2')!r}).module()(images)\n"
        f"torch.save(features, {str(tmp_path / 'found.pth')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "found.pth"), encoder.model(images), rtol=1e-5, atol=1e-5)


def test_a_graph_that_computes_something_else_is_refused() -> None:
    encoder = source(depth=1)

    def run(images: Tensor, plus: float = 0.0) -> list[Tensor]:
        tokens = encoder.model.forward_features(images)
        return [encoder.model(images) + plus, tokens]

    with torch.no_grad():
        assert "at 1x3x64x64, 3x3x64x64" in check(encoder, run, 1e-6)
        with pytest.raises(ValueError, match="computes something else than the encoder"):
            check(encoder, lambda images: run(images, plus=0.1), 1e-4)
        with pytest.raises(ValueError, match="computes something else than the encoder"):
            check(encoder, lambda images: run(images, plus=float("nan")), 1e-4)
        with pytest.raises(ValueError, match=r"gives features \(1, 47\) instead of \(1, 48\)"):
            check(encoder, lambda images: [part[..., :47] for part in run(images)], 1e-4)


def test_missing_packages_and_wrong_names_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        to_torch_export(source(depth=1), tmp_path / "out.onnx", False)
    monkeypatch.setattr("hybrid_ssl.hub.targets.onnx.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'hybrid-ssl\[onnx\]'"):
        to_onnx(source(depth=1), tmp_path / "out.onnx", True)
    assert not list(tmp_path.iterdir())
