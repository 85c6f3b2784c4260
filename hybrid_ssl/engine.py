"""Accelerate, as this project uses it: processes, devices, precision, signals. The loop itself is in `train.py`.

Loaders are not prepared (they would be sharded twice), `accumulate` is not used (it divides a last, shorter group by
the full count), `save_state` is not used (it is not atomic and pickles), schedulers are plain functions of the step.
"""

from __future__ import annotations

import os
import platform
import signal
import warnings
from collections.abc import Collection, Hashable, Iterator
from types import FrameType
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from . import __version__
from .config import RunSettings
from .nn.distributed import gather_no_grad, gather_objects
from .plan import Batch

DONE, NON_FINITE, COLLAPSED, STORAGE = 0, 3, 4, 5
"""exit codes of a run, besides 2 (something the user has to change) and those of `stop_code`"""
PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def launch(run: RunSettings) -> Accelerator:
    """Start Accelerate; ValueError when the launcher started more processes than Accelerate sees."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if run.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("run.precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    # sums in each process' buffers are equal by construction, so they need not be broadcast at every forward pass
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    plain = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision=PRECISION[run.precision],
        kwargs_handlers=[plain],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but Accelerate sees {accelerator.num_processes}: each would "
            "train alone and write to the same folder. On CPUs start them with `torchrun --nproc_per_node N`"
        )
    return accelerator


def moved(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device; the copy of the next one is queued before the current one is used."""
    if device.type == "cpu":
        yield from batches
        return
    ahead: Batch | None = None
    for batch in batches:
        following = _move(batch, device)
        if ahead is not None:
            yield ahead
        ahead = following


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Batch):
        return Batch(*(_move(part, device) for part in value))
    return {name: _move(part, device) for name, part in value.items()} if isinstance(value, dict) else value


def total(accelerator: Accelerator) -> Any:
    """A function that sums a tensor over all processes, or None with one process."""
    if accelerator.num_processes == 1:
        return None
    return lambda tensor: accelerator.reduce(tensor, reduction="sum")


def gathered(accelerator: Accelerator) -> Any:
    """A function that puts tensors of all processes together in rank order."""
    return gather_no_grad if accelerator.num_processes > 1 else None


def agreed(accelerator: Accelerator, ok: bool) -> bool:
    """Whether all processes say so; each waits for all."""
    if accelerator.num_processes == 1:
        return ok
    return bool(gather_no_grad(torch.tensor([ok], device=accelerator.device)).all())


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR1 (schedulers send it before the time is up) end the run after the current step."""

    EVERY = 10  # steps between two agreements of several processes: each costs a collective and a wait

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.number = accelerator, 0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def agreed(self, step: int, broken: Collection[Hashable], limit: float) -> tuple[int, int]:
        """(the signal that all processes stop for now, or 0; how many samples are broken, over all processes).

        Processes meet the same broken samples in other epochs: where their counts together pass the limit, each is
        counted once.
        """
        if self.accelerator.num_processes == 1:
            return self.number, len(broken)
        if step % self.EVERY:
            return 0, 0
        both = gather_no_grad(torch.tensor([[self.number, len(broken)]], device=self.accelerator.device))  # [W, 2]
        count = int(both[:, 1].sum())
        if count > limit:  # the same on all: they gather, or none does
            count = len(set().union(*gather_objects(set(broken))))
        return int(both[:, 0].max()), count

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # the second one does not wait
            raise KeyboardInterrupt
        self.number = number


def stop_code(number: int) -> int:
    """Exit code for a signal; 0 for none."""
    return {0: DONE, signal.SIGINT: 130}.get(number, 143)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Itself, or put together from its shards; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def read_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and optimizer state, whole also when sharded; all processes call it."""
    if is_sharded(model):
        return (
            get_model_state_dict(model, options=_WHOLE),
            get_optimizer_state_dict(model, optimizer, options=_WHOLE),
        )
    return model.state_dict(), optimizer.state_dict()


def write_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """The inverse of `read_state`; every name must fit."""
    if is_sharded(model):
        set_model_state_dict(model, tensors, options=_WHOLE)
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=_WHOLE)
        return
    model.load_state_dict(tensors, strict=True)
    optimizer.load_state_dict(optimizer_state)


def hardware(accelerator: Accelerator) -> str:
    """E.g. `8 x NVIDIA H200` or `2 CPU processes`."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    n = accelerator.num_processes
    return f"{n} CPU process{'es' if n > 1 else ''} of {torch.get_num_threads()} threads"


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions and hardware, for the run folder; no host name, no paths."""
    return {
        "hybrid_ssl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "hardware": hardware(accelerator),
    }
