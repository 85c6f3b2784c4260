"""Gathers, sums and BatchNorm over two processes, all in one start of the processes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.batchnorm import SyncBatchNorm1d
from hybrid_ssl.nn.distributed import (
    all_max_no_grad,
    all_sum,
    all_sum_no_grad,
    gather,
    gather_no_grad,
    rank,
    world_size,
)
from tests.ranks import run_two_ranks

WHOLE = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FACTOR = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own_rows(sizes: tuple[int, int] = (3, 3)) -> tuple[Tensor, Tensor]:
    """This process's rows of WHOLE and FACTOR; all of them where there is one process."""
    if world_size() == 1:
        return WHOLE.clone().requires_grad_(), FACTOR
    x, factor = (tensor.split(sizes)[rank()] for tensor in (WHOLE, FACTOR))
    return x.clone().requires_grad_(), factor


def collectives() -> dict[str, Any]:
    x, _ = own_rows()
    out: dict[str, Any] = {"gather": gather(x), "constant": gather_no_grad(x), "max": all_max_no_grad(x.amax(0))}
    out["sum"] = all_sum_no_grad(x.sum(0))
    # A loss that is the same number on all ranks: summed back it is W times too large, and DDP divides by W.
    (out["gather_gradient"],) = torch.autograd.grad((gather(x) * FACTOR).square().sum(), x)
    (out["sum_gradient"],) = torch.autograd.grad(all_sum(x.square().sum(0)).square().sum(), x)
    out["requires_grad"] = [gather(x).requires_grad, gather_no_grad(x).requires_grad, all_sum_no_grad(x).requires_grad]
    return {key: value.detach() if isinstance(value, Tensor) else value for key, value in out.items()}


def normalised(sizes: tuple[int, int]) -> dict[str, Tensor]:
    x, factor = own_rows(sizes)
    layer = SyncBatchNorm1d(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    y = layer(x)
    (y * factor).square().sum().backward()  # summed over ranks, this is the loss of the whole batch
    summed = [all_sum_no_grad(p.grad) for p in (layer.weight, layer.bias)]
    return {"y": y.detach(), "x": x.grad, "weight": summed[0], "bias": summed[1]}


def both() -> dict[str, Any]:
    return {"collectives": collectives(), "equal": normalised((3, 3)), "unequal": normalised((2, 4))}


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_two_ranks(both)


def test_collectives_are_identities_in_one_process() -> None:
    assert (rank(), world_size()) == (0, 1)
    out = collectives()
    assert torch.equal(out["gather"], WHOLE) and torch.equal(out["sum"], WHOLE.sum(0))


def test_gather_keeps_rank_order(ranks: list[Any]) -> None:
    for result in ranks:
        assert torch.equal(result["collectives"]["gather"], WHOLE)
        assert torch.equal(result["collectives"]["constant"], WHOLE)
        assert result["collectives"]["requires_grad"] == [True, False, False]


def test_gather_sums_gradients_of_all_ranks(ranks: list[Any]) -> None:
    alone = collectives()["gather_gradient"]
    together = torch.cat([result["collectives"]["gather_gradient"] for result in ranks])
    torch.testing.assert_close(together, 2 * alone)


def test_sums_and_maxima_cover_all_ranks(ranks: list[Any]) -> None:
    alone = collectives()
    for result in ranks:
        torch.testing.assert_close(result["collectives"]["sum"], alone["sum"])
        torch.testing.assert_close(result["collectives"]["max"], alone["max"])
    together = torch.cat([result["collectives"]["sum_gradient"] for result in ranks])
    torch.testing.assert_close(together, 2 * alone["sum_gradient"])


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
def test_two_ranks_normalise_like_one(ranks: list[Any], sizes: str) -> None:
    alone = normalised((3, 3))
    for key in ("y", "x"):
        torch.testing.assert_close(torch.cat([result[sizes][key] for result in ranks]), alone[key])
    for key in ("weight", "bias"):
        torch.testing.assert_close(ranks[0][sizes][key], alone[key])


@pytest.mark.parametrize("affine", [True, False])
def test_one_process_equals_torch(affine: bool) -> None:
    ours, theirs = SyncBatchNorm1d(3, affine=affine).double(), torch.nn.BatchNorm1d(3, affine=affine).double().train()
    x = WHOLE * 5 + 20
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.eval()(x).equal(ours.train()(x))  # always the batch's statistics
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_scale_without_shift() -> None:
    assert [n for n, _ in SyncBatchNorm1d(3, shift=False).named_parameters()] == ["weight"]


def test_half_precision_rows_are_normalised_in_float32() -> None:
    x = (torch.randn(64, 3) * 3 + 200).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = SyncBatchNorm1d(3)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.batch_norm(x.float(), None, None, training=True))


def test_a_single_row_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 1"):
        SyncBatchNorm1d(3)(WHOLE[:1])
