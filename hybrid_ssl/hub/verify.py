"""An export counts when somebody else's process loads it and gets the same numbers.

    python -m hybrid_ssl.hub.verify FOLDER PROBE

loads the folder with timm and, if it is installed, with transformers, and compares the outputs with those that the
model in memory gave (`PROBE`, a safetensors file with input and outputs). The main process starts it fresh, so that
nothing of the training process (imports, patched modules, attention switches) can help.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TIMEOUT = 900  # seconds; a cold import of transformers from a network disk takes one minute
_PACKAGES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, as sentences."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def verify_export(folder: Path, model: nn.Module) -> VerifyReport:
    """Load `folder` in a fresh process and compare its outputs with `model`'s, bit by bit.

    Raises:
        ValueError: it cannot be loaded, or gives other outputs; by how much.
    """
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        images = _input(folder)
        save_file({"images": images} | _outputs(plain_copy(model), images), probe)
        command = [sys.executable, "-m", "hybrid_ssl.hub.verify", str(folder.resolve()), str(probe)]
        done = _run(command)
    if done.returncode:
        raise ValueError(f"the export {folder} does not load in a fresh process:\n{done.stderr[-2000:]}")
    results: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: r for name, r in results.items() if not r["equal"]}
    if wrong:
        raise ValueError(
            f"the export {folder} gives other outputs than the trained encoder: "
            + "; ".join(f"{name}: {r['text']}" for name, r in wrong.items())
        )
    return VerifyReport(tuple(f"{name}: {r['text']}" for name, r in results.items()))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU: float32, eval, contiguous, plain attention, no noise left over from training."""
    plain: nn.Module = copy.deepcopy(model).to("cpu", torch.float32).eval()
    module: Any  # not every module has these attributes
    for module in plain.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # as in the fresh process, see `_environment`
        if hasattr(module, "noise"):  # stochastic depth of the last training step
            module.noise = None
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor.data = tensor.data.contiguous()
    return plain


def _input(folder: Path) -> Tensor:
    size = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"]
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    with torch.autocast("cpu", enabled=False):
        outputs = {"tokens": model.forward_features(images), "pooled": model(images)}
    return {name: value.contiguous() for name, value in outputs.items()}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"loading the export took a fresh process more than {TIMEOUT} s: {' '.join(command)}"
        ) from None


def launcher_free() -> dict[str, str]:
    """Our environment without what belongs to the launcher, for one more process that finds this package."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("ACCELERATE_")}
    paths = [str(_PACKAGES), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _environment() -> dict[str, str]:
    """One process, on the CPU, no network, as many threads as here."""
    return launcher_free() | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums depend on how they are split
        "TIMM_FUSED_ATTN": "0",  # fused and plain attention round differently
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def main(folder: Path, probe: Path) -> None:
    """The fresh process: prints one line of JSON, name -> {equal, text}."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # copies: file-backed memory is aligned differently, and CPU kernels round differently then
    expected = {name: value.clone() for name, value in load_file(probe).items()}
    results = {f"timm {timm.__version__}": compare(expected, _timm_outputs(folder, expected["images"]))}
    if importlib.util.find_spec("transformers") is None:
        results["transformers"] = {"equal": True, "text": "not installed, not checked"}
    else:
        import transformers

        read = _transformers_logits if _classifies(folder) else _transformers_outputs
        found = read(folder, expected["images"])
        results[f"transformers {transformers.__version__}"] = compare(expected, found)
        if expected["images"].shape[1] == 3:
            results["transformers' image processor"] = _processor(folder)
    print(json.dumps(results))


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Are all of `found` bit for bit as expected, and if not, how far off?"""
    for name, value in found.items():
        target = expected[name]
        if value.shape != target.shape:
            return {"equal": False, "text": f"{name} {tuple(value.shape)} instead of {tuple(target.shape)}"}
        if not torch.equal(value, target):
            return {"equal": False, "text": f"{name} differ by up to {(value - target).abs().max().item():.3g}"}
    return {"equal": True, "text": f"equal outputs ({', '.join(found)})"}


def _timm_outputs(folder: Path, images: Tensor) -> dict[str, Tensor]:
    return _outputs(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), images)


@torch.no_grad()
def _transformers_outputs(folder: Path, images: Tensor) -> dict[str, Tensor]:
    from transformers import AutoModel

    out = AutoModel.from_pretrained(folder).eval()(pixel_values=images)
    return {"tokens": out.last_hidden_state, "pooled": out.pooler_output}


@torch.no_grad()
def _transformers_logits(folder: Path, images: Tensor) -> dict[str, Tensor]:
    """Of a classifier, whose class names must have arrived, too."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    names = json.loads((folder / "config.json").read_text())["label_names"]
    if [model.config.id2label[i] for i in range(model.config.num_labels)] != names:
        raise ValueError(f"transformers reads other class names: {model.config.id2label}")
    return {"pooled": model(pixel_values=images).logits}


def _classifies(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text()).get("label_names"))


def _processor(folder: Path) -> dict[str, Any]:
    """An 8-bit image through transformers' own preprocessing: right size, right mean and standard deviation."""
    from PIL import Image
    from transformers import AutoImageProcessor

    wanted = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    gray = Image.new("RGB", (300, 200), (128, 128, 128))
    pixels = AutoImageProcessor.from_pretrained(folder)(gray, return_tensors="pt")["pixel_values"]
    mean, std = torch.tensor(wanted["mean"]), torch.tensor(wanted["std"])
    target = ((128 / 255 - mean) / std).view(1, -1, 1, 1).expand(1, *wanted["input_size"])
    right = pixels.shape == target.shape and torch.allclose(pixels, target, atol=1e-5)
    return {
        "equal": right,
        "text": "right size, mean and std" if right else f"{tuple(pixels.shape)}, or other mean, std",
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
