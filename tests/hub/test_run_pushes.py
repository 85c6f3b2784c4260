"""A run pushes its encoder; the Hub may fail, the run does not, and the token of the environment is written nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hybrid_ssl.hub.folder import is_export

from .loopback import TOKEN, LoopbackHub

ROOT = Path(__file__).parents[2]
REPO = "user/encoder"
RECIPE = f"""
run: {{length: 4 steps, batch_size: 8, out: OUT, workers: 0, checkpoint_every: 2 steps}}
encoder: {{name: vit_tiny_patch16_224, args: {{depth: 1, embed_dim: 24, num_heads: 2, patch_size: 8}}}}
data:
  {{source: embedded:fashion_mnist, channels: 1, mean: [0.3], std: [0.3], probe: {{train_images: 40, test_images: 10}}}}
views: {{plain: {{size: 32}}}}
masks: {{random: {{kind: random, view: plain, ratio: 0.75}}}}
objectives: {{mae: {{decoder_depth: 1, decoder_dim: 16, decoder_heads: 2}}}}
optimizer: {{lr: 1e-3}}
monitor: {{probe_every: null, log_every: 2}}
export: {{licence: cc-by-4.0, verify: false}}
hub: {{repo: {REPO}, push: 2 steps}}
"""


def test_run_survives_a_failed_push_and_pushes_at_its_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("OUT", str(out)))
    with LoopbackHub() as hub:
        hub.fail = lambda request: 403 if "/commit/" in request and hub.requests.count(request) == 1 else None
        done = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "pretrain.py"), str(tmp_path / "recipe.yaml")],
            capture_output=True,
            text=True,
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        log = (out / "train.log").read_text()
        assert "warning: step 2 was not pushed, the run goes on" in log and "403" in log
        assert "step 4 pushed to user/encoder: http" in log
        assert is_export(out / "encoder") and not (out / ".pushing").exists()
        assert hub.read(REPO, "model.safetensors") == (out / "encoder" / "model.safetensors").read_bytes()
        assert b"license: cc-by-4.0" in hub.read(REPO, "README.md")
        assert hub.repositories[REPO].private
        written = {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        written |= {"said": (done.stdout + done.stderr).encode()} | hub.blobs
    assert not [name for name, content in written.items() if TOKEN.encode() in content]
