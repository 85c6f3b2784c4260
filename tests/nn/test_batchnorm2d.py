"""BatchNorm of maps: torch's numbers with one process, those of the whole batch with two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hybrid_ssl.nn.batchnorm2d import SyncBatchNorm2d
from tests.ranks import run_two_ranks


def maps() -> Tensor:
    return torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 50


def norm(kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    layer = kind(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    return layer


def of_my_rows() -> list[Tensor]:
    rows = [slice(0, 4), slice(4, 6)][torch.distributed.get_rank()]  # of other numbers
    layer, x = norm(SyncBatchNorm2d), maps()[rows].requires_grad_()
    out = layer(x)
    (out * maps()[rows].square()).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    return [out.detach(), x.grad, layer.running_mean, layer.running_var, layer.weight.grad]


def test_two_processes_normalise_by_the_whole_batch() -> None:
    layer, x = norm(nn.BatchNorm2d), maps().requires_grad_()
    out = layer(x)
    (out * maps().square()).sum().backward()
    ranks = run_two_ranks(of_my_rows)
    assert torch.allclose(torch.cat([rank[0] for rank in ranks]), out, rtol=1e-10)
    assert torch.allclose(torch.cat([rank[1] for rank in ranks]), x.grad, rtol=1e-7, atol=1e-7)
    for rank in ranks:
        assert torch.allclose(rank[2], layer.running_mean) and torch.allclose(rank[3], layer.running_var)
    assert torch.allclose(ranks[0][4] + ranks[1][4], layer.weight.grad)


def test_one_process_is_torchs() -> None:
    ours, theirs = norm(SyncBatchNorm2d), norm(nn.BatchNorm2d)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(ours(maps()), theirs(maps()))
    assert torch.equal(ours.eval()(maps()), theirs.eval()(maps()))


def test_a_single_value_is_refused() -> None:
    with pytest.raises(ValueError, match="larger batch"):
        SyncBatchNorm2d(3)(torch.zeros(1, 3, 1, 1))
