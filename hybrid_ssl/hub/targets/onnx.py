"""ONNX: the encoder as one file for onnxruntime, TensorRT, OpenVINO and others, checked with onnxruntime."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .dynamic import check, describe, trace
from .source import Source, published

LIMIT = 2**31 - 2**20  # bytes: a protobuf file ends at 2 GiB


def to_onnx(source: Source, out: Path, verify: bool) -> list[str]:
    """Write a .onnx file."""
    needed = ("onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'hybrid-ssl[onnx]'")
    if sum(p.numel() * p.element_size() for p in source.model.parameters()) > LIMIT:
        raise ValueError("--to onnx: the weights do not fit into one file of 2 GiB; use --to torch-export")
    with published(out, (".onnx",)) as path:
        _write(source, path)
        report = [f"onnxruntime: {check(source, Runner(path), tolerance=1e-4)}"] if verify else []  # other kernels
    return [
        *report,
        describe(source),
        f"run it: features, tokens = onnxruntime.InferenceSession({out.name!r}).run(None, {{'images': images}})",
    ]


def _write(source: Source, path: Path) -> None:
    program = trace(source)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress is not ours
        graph = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=["features", "tokens"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert graph is not None
    graph.model.metadata_props.update({name: json.dumps(value) for name, value in source.facts().items()})
    graph.save(path, external_data=False)


class Runner:
    """onnxruntime on the CPU, tensors in and out."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(value) for value in self.session.run(None, {"images": images.numpy()})]
