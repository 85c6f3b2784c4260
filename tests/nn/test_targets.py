"""What makes or keeps targets over a run: the centre, Sinkhorn and the queue, in one process and in two."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn.center import Center
from hybrid_ssl.nn.distributed import rank, world_size
from hybrid_ssl.nn.queue import Queue
from hybrid_ssl.nn.sinkhorn import sinkhorn
from tests.ranks import run_two_ranks

LOGITS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SPLITS = {"equal": (6, 6), "unequal": (9, 3), "empty": (12, 0)}


def own_rows(sizes: tuple[int, int]) -> Tensor:
    return LOGITS if world_size() == 1 else LOGITS.split(sizes)[rank()]


def centred(sizes: tuple[int, int]) -> Tensor:
    center = Center(5).double()
    for scale in (1.0, -2.0):
        rows = scale * own_rows(sizes)
        center.update(rows.sum(0), len(rows))
    return center.value


def queued() -> list[Tensor]:
    torch.manual_seed(0)
    queue = Queue(7, 5).double()
    for step in range(2):
        queue.push(own_rows((6, 6))[2 * step : 2 * step + 2])
    return [queue.rows, queue.pointer, queue.filled]


def everything() -> dict[str, Any]:
    out: dict[str, Any] = {"queue": queued()}
    for name, sizes in SPLITS.items():
        out[name] = {"center": centred(sizes), "sinkhorn": sinkhorn(own_rows(sizes), 0.05)}
    center = Center(5).double()
    bad = torch.full((5,), torch.inf) if rank() == 0 else torch.ones(5)
    center.update(bad.double(), 1)
    out["after_inf"] = center.value
    return out


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_two_ranks(everything)


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_center_like_one(ranks: list[Any], split: str) -> None:
    alone = centred((12, 0))
    for result in ranks:
        torch.testing.assert_close(result[split]["center"], alone)


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_balance_like_one(ranks: list[Any], split: str) -> None:
    together = torch.cat([result[split]["sinkhorn"] for result in ranks])
    torch.testing.assert_close(together, sinkhorn(LOGITS, 0.05))


def test_a_bad_batch_on_one_rank_leaves_every_center_alone(ranks: list[Any]) -> None:
    assert all(torch.equal(result["after_inf"], torch.zeros(5).double()) for result in ranks)


def test_queue_is_equal_on_all_ranks_and_in_rank_order(ranks: list[Any]) -> None:
    first, second = LOGITS[:6], LOGITS[6:]
    pushed = torch.cat((first[:2], second[:2], first[2:4], second[2:4]))  # 8 rows into 7 places
    for result in ranks:
        rows, pointer, filled = result["queue"]
        torch.testing.assert_close(rows, torch.cat((pushed[7:], pushed[1:7])))
        assert (int(pointer), int(filled)) == (1, 7)


def test_a_bad_row_leaves_the_queues_row_alone() -> None:
    queue = Queue(4, 5).double()
    before, new = queue.read(), LOGITS[:2].clone()
    new[0, 3] = torch.nan
    queue.push(new)
    torch.testing.assert_close(queue.rows, torch.cat((before[:1], new[1:], before[2:])))


def test_center_after_one_step_is_a_tenth_of_the_mean() -> None:
    center = Center(5).double()
    center.update(LOGITS.sum(0), len(LOGITS))
    torch.testing.assert_close(center.value, 0.1 * LOGITS.mean(0))
    torch.testing.assert_close(center.softmax(LOGITS, 0.04), ((LOGITS - center.value) / 0.04).softmax(-1))
    center.update(torch.zeros(5), 0)  # nobody had a row
    torch.testing.assert_close(center.value, 0.1 * LOGITS.mean(0))
    assert list(center.state_dict()) == ["value"]


def test_center_stays_float32_and_gives_no_gradient() -> None:
    center, logits = Center(5), LOGITS.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        targets = center.softmax(logits, 0.04)
        center.update(logits.sum(0), len(logits))
    assert targets.dtype == center.value.dtype == torch.float32
    assert not targets.requires_grad and not center.value.requires_grad


def published_sinkhorn(logits: Tensor, epsilon: float, iterations: int) -> Tensor:
    """As the papers write it: exponentials, with all constants."""
    q = (logits / epsilon).exp().T
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / rows
    return (q * rows).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_log_domain_equals_the_published_form(iterations: int) -> None:
    ours = sinkhorn(LOGITS, 0.3, iterations)
    torch.testing.assert_close(ours, published_sinkhorn(LOGITS, 0.3, iterations))
    torch.testing.assert_close(sinkhorn(LOGITS + 100, 0.3, iterations), ours)  # no overflow, no effect
    torch.testing.assert_close(ours.sum(1), torch.ones(12).double())


def test_sinkhorn_balances_prototypes() -> None:
    skewed = LOGITS + torch.tensor([5.0, 0, 0, 0, -5.0]).double()
    usage = sinkhorn(skewed, 0.5, iterations=50).sum(0)
    torch.testing.assert_close(usage, torch.full((5,), 12 / 5).double(), rtol=0.01, atol=0)


def test_sinkhorn_survives_logits_that_overflow_exponentials() -> None:
    extreme = torch.tensor([[5.0, -5.0, 0.0], [5.0, -5.0, 1.0], [4.0, -5.0, 0.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        targets = sinkhorn(extreme.to(dtype), 0.02)
        assert targets.dtype == torch.float32 and targets.isfinite().all()
    assert not published_sinkhorn(extreme, 0.02, 3).isfinite().all()


@pytest.mark.parametrize("n", [3, 4, 10])
def test_queue_keeps_the_newest_rows_whatever_the_batch(n: int) -> None:
    queue, pushed = Queue(8, 5).double(), []
    for step in range(5):
        rows = torch.full((n, 5), float(step)).double() + torch.arange(n).double().unsqueeze(1) / 100
        queue.push(rows)
        pushed += rows[:, 0].tolist()
    assert sorted(queue.rows[:, 0].tolist()) == sorted(pushed[-8:])
    assert int(queue.filled) == 8


def test_queue_starts_with_unit_rows_and_is_saved() -> None:
    queue = Queue(6, 5)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(6))
    assert set(queue.state_dict()) == {"rows", "pointer", "filled"} and int(queue.filled) == 0
    twin = Queue(6, 5)
    queue.push(torch.ones(4, 5))
    twin.load_state_dict(queue.state_dict())
    for each in (queue, twin):
        each.push(torch.zeros(4, 5))
    assert torch.equal(queue.rows, twin.rows)


def test_a_graph_survives_the_next_push() -> None:
    queue, query = Queue(6, 5), torch.randn(2, 5, requires_grad=True)
    loss = (query @ queue.read().T).square().sum()
    queue.push(torch.ones(2, 5))
    loss.backward()
    assert query.grad is not None
