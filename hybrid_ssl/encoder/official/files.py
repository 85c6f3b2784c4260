"""Tensors out of a checkpoint file, without executing what else is in it.

A pickle can run any program while it is read, so files are read with torch's `weights_only` unpickler, which knows
tensors and plain containers. Official files also hold the arguments of the run that made them: MAE's and DINO's an
`argparse.Namespace`, SimMIM's a `yacs` node, OpenMMLab's a log of numpy numbers. These few names are answered by
`Inert`, an object that keeps nothing and calls nothing: safer than allowing the real classes, and none of these
packages need be installed. A file with any other object is refused by its name.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors")
DICTIONARIES = ("yacs.config.CfgNode",)  # SimMIM, Swin
INERT = (
    "argparse.Namespace",  # MAE, DINO, iBOT, MultiMAE
    "mmengine.logging.history_buffer.HistoryBuffer",  # CMAE and other OpenMMLab files
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
)
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NOT_MODELS = re.compile(r"(optim\w*|opt|\w*_optimizer|scaler|\w*sched\w*)\.", re.IGNORECASE)


class Inert:
    """Stands for an object that is not needed: takes any arguments and any state, and does nothing with them."""

    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class InertDictionary:
    """The same for a dictionary of a package's own kind: torch fills plain ones only."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file but an optimizer's, by the dotted path to them, without wrappers such as `module.`.

    Raises:
        ValueError: it cannot be read, holds objects that would have to be executed, or no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            tree: Any = load_file(path)
        else:
            stand_ins: list[Any] = [_stand_in(name, Inert) for name in INERT]
            stand_ins += [_stand_in(name, InertDictionary) for name in DICTIONARIES]
            with torch.serialization.safe_globals(stand_ins):
                tree = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from error
    except (OSError, RuntimeError, EOFError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    found = {_WRAPPERS.sub("", name): tensor for name, tensor in _walk(tree, "")}
    found = {name: tensor for name, tensor in found.items() if not _NOT_MODELS.match(name)}
    if not found:
        raise ValueError(f"{path} holds no tensors by name: give a file with the state_dict of a model")
    return found


def _stand_in(name: str, kind: type) -> type:
    module, _, own = name.rpartition(".")
    return type(own, (kind,), {"__module__": module})


def _walk(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from _walk(value, f"{prefix}{key}.")


def _refusal(path: Path, error: str) -> str:
    names = ", ".join(dict.fromkeys(re.findall(r"GLOBAL ([\w.]+)", error)))
    inside = f"objects of other programs ({names})" if names else "something that is no checkpoint of torch"
    return (
        f"{path} holds {inside}; reading them could run any code, so it is not read. If you trust who made it, write "
        f"its tensors to a new file once, see docs/weights.md: torch.save(torch.load({path.name!r}, "
        "weights_only=False)['model'], 'tensors.pth'), with the key under which the weights are"
    )
