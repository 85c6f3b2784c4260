"""KoLeo: the published number, gradients at both ends, duplicates, and neighbours on other processes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.distributed import rank, world_size
from hybrid_ssl.nn.koleo import Among, koleo
from tests.objectives.harness import average
from tests.ranks import run_two_ranks

ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def brute_force(x: Tensor) -> Tensor:
    x = x / x.norm(dim=1, keepdim=True)
    nearest = [min((a - b).add(1e-8).norm() for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
    return -torch.stack([(d + 1e-8).log() for d in nearest]).mean()


def test_equals_a_double_loop() -> None:
    torch.testing.assert_close(koleo(ROWS), brute_force(ROWS), rtol=1e-12, atol=0)


def test_equals_lightlys() -> None:
    lightly = pytest.importorskip("lightly.loss")
    torch.testing.assert_close(koleo(ROWS), lightly.KoLeoLoss()(ROWS))


def test_gradient_equals_the_double_loops() -> None:
    ours, plain = ROWS.clone().requires_grad_(), ROWS.clone().requires_grad_()
    koleo(ours).backward()
    brute_force(plain).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)


def test_gradient_reaches_the_neighbour() -> None:
    """Rows 0 and 1 are a close pair, and row 1 is row 2's neighbour as well; a detached neighbour would miss that."""
    x = torch.tensor([[1.0, 0.0, 0.0], [0.999, 0.04, 0.0], [0.6, 0.8, 0.0]], dtype=torch.float64)
    y = x.clone().requires_grad_()
    koleo(y).backward()
    numeric = torch.zeros_like(x)
    for i in range(3):
        for d in range(3):
            step = torch.zeros_like(x)
            step[i, d] = 1e-6
            numeric[i, d] = (koleo(x + step) - koleo(x - step)) / 2e-6
    torch.testing.assert_close(y.grad, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_find_each_other_and_do_not_explode(dtype: torch.dtype) -> None:
    x = torch.cat((ROWS, ROWS[:1])).to(dtype).requires_grad_()
    loss = koleo(x)
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.norm() < 10
    pair = -math.log(1e-8 * math.sqrt(5) + 1e-8)  # the published value of a duplicate
    rest = brute_force(x.detach())
    torch.testing.assert_close(loss, rest)
    assert loss > 2 * pair / 9


def test_half_precision_is_computed_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo(ROWS.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, koleo(ROWS.bfloat16().float()))


def test_one_row_has_no_neighbour() -> None:
    with pytest.raises(ValueError, match="run.micro_batch to 2"):
        koleo(ROWS[:1])


def spread(among: Among) -> list[Tensor]:
    """Loss and gradient of a parameter that all rows share, averaged over processes as DDP does."""
    own = ROWS.chunk(world_size())[rank()]
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    loss = koleo(own @ weight, among)
    loss.backward()
    assert weight.grad is not None
    return [average(loss.detach()), average(weight.grad)]


def spread_both() -> dict[str, Any]:
    return {"all": spread("all"), "process": spread("process")}


def test_two_ranks_equal_one_where_all_rows_are_neighbours() -> None:
    for result in run_two_ranks(spread_both):
        torch.testing.assert_close(result["all"], spread("all"), rtol=1e-10, atol=1e-14)
        halves = torch.stack([koleo(half) for half in ROWS.chunk(2)]).mean()
        torch.testing.assert_close(result["process"][0], halves)
