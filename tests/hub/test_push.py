"""Pushed encoders load from the Hub with equal outputs; a push that fails changes nothing there; tokens stay secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts
from hybrid_ssl.hub.push import PushError, push_export
from hybrid_ssl.hub.pushes import SNAPSHOT, PushesOfRun

from .loopback import TOKEN, LoopbackHub

ROOT = Path(__file__).parents[2]
REPO = "user/encoder"
COMMIT = f"POST /api/models/{REPO}/commit/main"


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=48, num_heads=3, img_size=64
    ).eval()


def export(folder: Path, seed: int = 0, heads: bool = True) -> nn.Module:
    model = build(seed)
    export_encoder(
        model,
        folder,
        input_size=(3, 64, 64),
        mean=[0.4] * 3,
        std=[0.2] * 3,
        card=CardFacts(),
        licence="mit",
        heads={"mae.w": torch.full((2,), float(seed))} if heads else None,
        verify=False,
    )
    return model


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def push(hub: LoopbackHub, home: Path, folder: Path, *flags: str, **env: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "push.py"), str(folder), REPO, *flags]
    environment = hub.environment(home, **env) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def load_from_hub(hub: LoopbackHub, home: Path, out: Path, ways: str = "timm") -> dict[str, torch.Tensor]:
    """Features of one image by a fresh process that knows the hub only."""
    code = f"""
import sys, timm, torch
from safetensors.torch import save_file
images = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
with torch.no_grad():
    results = {{"timm": timm.create_model("hf-hub:{REPO}", pretrained=True).eval()(images)}}
    if "{ways}" == "all":
        from hybrid_ssl.hub.load import load_encoder
        results["ours"] = load_encoder("hf-hub:{REPO}")(images)
        try:
            load_encoder("hf-hub:user/nothing")
        except ValueError as error:
            assert "encoder 'hf-hub:user/nothing' cannot be built" in str(error) and "404" in str(error), error
        else:
            raise AssertionError("loaded from nowhere")
        from transformers import AutoImageProcessor, AutoModel
        results["transformers"] = AutoModel.from_pretrained("{REPO}").eval()(pixel_values=images).pooler_output
        results["mean"] = torch.tensor(AutoImageProcessor.from_pretrained("{REPO}").data_config["mean"])
save_file({{name: value.clone() for name, value in results.items()}}, sys.argv[1])
"""
    environment = hub.environment(home) | {"PYTHONPATH": str(ROOT), "TIMM_FUSED_ATTN": "0"}
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return load_file(out)


def features(model: nn.Module) -> torch.Tensor:
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))


def test_pushed_encoder_loads_everywhere_with_equal_outputs(hub: LoopbackHub, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = export(tmp_path / "run" / "encoder")
    done = push(hub, tmp_path / "home", tmp_path / "run", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/{REPO}/commit/" in done.stdout
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].files.keys() == {"model.safetensors", "config.json", "README.md", "heads.safetensors"}
    found = load_from_hub(hub, tmp_path / "home", tmp_path / "found.safetensors", ways="all")
    expected = features(model)
    for way in ("timm", "ours", "transformers"):
        torch.testing.assert_close(found[way], expected, rtol=0, atol=1e-6)
    assert found["mean"].tolist() == pytest.approx([0.4] * 3)


def test_second_push_changes_nothing_and_a_new_encoder_replaces_all_files(hub: LoopbackHub, tmp_path: Path) -> None:
    export(tmp_path / "out")
    assert push(hub, tmp_path / "home", tmp_path / "out").returncode == 0
    repository = hub.repositories[REPO]
    first, uploads = repository.head, sum(r.startswith("PUT") for r in hub.requests)
    assert push(hub, tmp_path / "home", tmp_path / "out").returncode == 0
    assert repository.head == first and sum(r.startswith("PUT") for r in hub.requests) == uploads == 2
    export(tmp_path / "out", seed=1, heads=False)
    assert push(hub, tmp_path / "home", tmp_path / "out").returncode == 0
    assert hub.read(REPO, "model.safetensors") == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "heads.safetensors" not in repository.files  # those of the first encoder


@pytest.mark.parametrize("broken", [COMMIT, "PUT /lfs/"])
def test_push_that_fails_half_way_leaves_the_earlier_encoder_and_no_token(
    broken: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    """400 is not tried again; the server repeats the Authorization header in its answer."""
    model = export(tmp_path / "out")
    assert push(hub, tmp_path / "home", tmp_path / "out").returncode == 0
    head = hub.repositories[REPO].head
    export(tmp_path / "out", seed=1)
    hub.fail = lambda request: 400 if request.startswith(broken) else None
    failed = push(hub, tmp_path / "home", tmp_path / "out", "--traceback")
    assert failed.returncode != 0 and "out was not pushed to user/encoder" in failed.stderr
    assert TOKEN not in failed.stdout + failed.stderr
    assert hub.repositories[REPO].head == head
    found = load_from_hub(hub, tmp_path / "home", tmp_path / "found.safetensors")
    torch.testing.assert_close(found["timm"], features(model), rtol=0, atol=1e-6)
    hub.fail = lambda request: None
    assert push(hub, tmp_path / "home", tmp_path / "out").returncode == 0
    assert hub.repositories[REPO].head != head


def test_what_keeps_a_push_from_starting_is_one_sentence(hub: LoopbackHub, tmp_path: Path) -> None:
    export(tmp_path / "out")
    done = push(hub, tmp_path / "home", tmp_path / "out", token=None)
    assert done.returncode == 2 and "set HF_TOKEN, or run `hf auth login`" in done.stderr
    assert not hub.requests
    assert push(hub, tmp_path / "home", tmp_path / "out").returncode == 0
    done = push(hub, tmp_path / "home", tmp_path / "out", "--private")
    assert done.returncode == 2 and "user/encoder is public, but a private repository was asked for" in done.stderr


@pytest.mark.parametrize("repo", ["encoder", "a/b/c", "user/", "user/a..b", "https://user/x"])
def test_wrong_names_are_explained(repo: str, tmp_path: Path) -> None:
    with pytest.raises(PushError, match="no repository of the Hub"):
        push_export(tmp_path, repo)


def test_an_export_that_holds_a_token_is_not_pushed(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    secret = "secret-of-another-kind-1234"
    monkeypatch.setenv("HF_TOKEN", secret)
    for planted in (secret, "hf_" + "AbCd1234" * 4, "https://ada:geheim@host/x"):
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"note": planted}))
        with pytest.raises(PushError, match=r"config\.json of this export holds") as caught:
            push_export(tmp_path / "out", REPO)
        assert planted not in str(caught.value)


@pytest.fixture
def environment(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)


def test_a_run_pushes_snapshots_and_says_how_it_went(hub: LoopbackHub, tmp_path: Path, environment: None) -> None:
    export(tmp_path / "encoder")
    said: list[str] = []
    pushes = PushesOfRun(tmp_path, REPO, private=True, say=said.append)
    assert pushes.start(tmp_path / "encoder", "step 5")
    weights = (tmp_path / "encoder" / "model.safetensors").read_bytes()
    export(tmp_path / "encoder", seed=1)  # the run goes on and replaces its export
    assert not pushes.start(tmp_path / "encoder", "step 10")
    assert said == ["step 10 is not pushed to user/encoder: the push of step 5 still goes on"]
    pushes.finish()
    assert "step 5 pushed to user/encoder: http" in said[1] and not (tmp_path / SNAPSHOT).exists()
    assert hub.repositories[REPO].private and hub.read(REPO, "model.safetensors") == weights


def test_a_push_that_fails_or_hangs_costs_a_run_one_line(
    hub: LoopbackHub, tmp_path: Path, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "encoder")
    said: list[str] = []
    pushes = PushesOfRun(tmp_path, REPO, private=False, say=said.append)
    hub.fail = lambda request: 403
    assert pushes.start(tmp_path / "encoder", "step 5")
    pushes.finish()
    assert "step 5 was not pushed, the run goes on" in said[0] and "403" in said[0]
    assert f"hybrid-ssl push {tmp_path} user/encoder" in said[0]
    pushes.start(tmp_path / "encoder", "step 10")
    pushes.finish(timeout=0.01)
    assert "step 10 was not pushed, the run goes on: not finished after 0 s" in said[1]
    monkeypatch.setattr("hybrid_ssl.hub.pushes.subprocess.Popen", _no_memory)
    assert not pushes.start(tmp_path / "encoder", "step 15") and "Cannot allocate memory" in said[2]
    assert TOKEN not in "".join(said) and not pushes.running()


def _no_memory(*args: Any, **kwargs: Any) -> None:
    raise OSError(12, os.strerror(12))
