"""Runs a function in two gloo processes and brings the results back."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """[result of rank 0, result of rank 1] of `function(*args)`, a module-level function; results hold tensors,
    numbers, text, lists and dicts. A start costs seconds (two fresh interpreters): do all of a test module in one."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (folder, function, args), nprocs=2)
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


def _enter(rank: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
