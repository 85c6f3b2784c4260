"""SIGReg: the numbers that normal and constant rows give, the published form, and one sample over all processes."""

import pytest
import torch
from torch import Tensor

from hybrid_ssl.nn import sigreg as module
from hybrid_ssl.nn.distributed import rank, world_size
from hybrid_ssl.nn.sigreg import random_directions, sigreg
from tests.objectives.harness import average
from tests.ranks import run_two_ranks

DIRECTIONS = random_directions(16, 256, 0)


def normal(rows: int, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(z: Tensor, directions: Tensor) -> Tensor:
    """The authors' minimal script in other words: complex exponentials, explicit weights of the trapezoid rule."""
    t = torch.linspace(0, 3, 17, dtype=z.dtype)
    weights = torch.full((17,), 2 * 3 / 16, dtype=z.dtype)
    weights[0] = weights[-1] = 3 / 16
    window = torch.exp(-(t**2) / 2)
    total = []
    for a in directions.to(z).T:
        empirical = torch.stack([torch.exp(1j * (z @ a) * knot).mean() for knot in t])
        total.append(((empirical - window).abs() ** 2 * weights * window).sum() * len(z))
    return torch.stack(total).mean()


@pytest.mark.parametrize(("rows", "dim"), [(64, 16), (300, 16), (64, 256), (256, 256)])
def test_normal_rows_give_about_1_05_whatever_their_number_and_width(rows: int, dim: int) -> None:
    values = [sigreg(normal(rows, dim, seed), random_directions(dim, 64, seed)) for seed in range(32)]
    assert 0.95 < torch.stack(values).mean() < 1.15


@pytest.mark.parametrize("rows", [8, 64])
def test_zeros_give_0_402_times_their_number(rows: int) -> None:
    torch.testing.assert_close(sigreg(torch.zeros(rows, 16), DIRECTIONS), torch.tensor(0.402 * rows), rtol=2e-3, atol=0)


def test_equals_the_published_form_with_its_gradient() -> None:
    z = (0.7 * normal(12) + 0.3).requires_grad_()
    found, expected = sigreg(z, DIRECTIONS[:, :7]), published(z, DIRECTIONS[:, :7])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(value, z)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_views_are_samples_of_their_own() -> None:
    views = torch.stack([normal(20, seed=seed) + seed for seed in range(3)])
    each = torch.stack([sigreg(view, DIRECTIONS) for view in views])
    torch.testing.assert_close(sigreg(views, DIRECTIONS), each.mean())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z = normal(12).requires_grad_()
    whole = sigreg(z, DIRECTIONS)
    gradient = torch.autograd.grad(whole, z)[0]
    monkeypatch.setattr(module, "_NUMBERS", 12 * 17 * 50)
    chunked = sigreg(z, DIRECTIONS)
    torch.testing.assert_close([chunked, torch.autograd.grad(chunked, z)[0]], [whole, gradient])


def test_collapsed_rows_have_no_gradient() -> None:
    """Known of the method, and the reason for BatchNorm before it."""
    sizes = [float(torch.autograd.grad(sigreg(z, DIRECTIONS), z)[0].norm()) for z in _scaled(0.0, 1e-3, 0.1)]
    assert sizes[0] == 0 and sizes[1] < 0.02 * sizes[2] and sizes[2] > 0.3


def _scaled(*scales: float) -> list[Tensor]:
    return [(scale * normal(64)).requires_grad_() for scale in scales]


def test_directions_are_unit_and_depend_on_the_key_alone() -> None:
    torch.testing.assert_close(DIRECTIONS.norm(dim=0), torch.ones(256))
    torch.manual_seed(5)
    assert torch.equal(random_directions(16, 256, 0), DIRECTIONS)
    assert not torch.equal(random_directions(16, 256, 0, 1), random_directions(16, 256, 0, 2))


def test_half_precision_is_computed_in_float32() -> None:
    rows = normal(64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = sigreg(rows, DIRECTIONS)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sigreg(rows.float(), DIRECTIONS))


def of_own_rows() -> list[Tensor]:
    """The statistic and the gradient of a parameter that all rows share, averaged over processes as DDP does."""
    own = normal(24).chunk(world_size())[rank()]
    weight = torch.eye(16, dtype=torch.float64).requires_grad_()
    value = sigreg(own @ weight, DIRECTIONS)
    value.backward()
    assert weight.grad is not None
    return [value.detach(), average(weight.grad)]


def test_two_ranks_equal_one() -> None:
    """A sum whose result is dropped, or one that autograd does not see, would be off by the number of processes."""
    for result in run_two_ranks(of_own_rows):
        torch.testing.assert_close(result, of_own_rows(), rtol=1e-10, atol=1e-13)
