import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.cross_entropy import across_views, entropy_share, soft_cross_entropy


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_pair(targets: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, int]:
    """The mean over pairs as the paper writes it, and how many there were."""
    terms = []
    for (i, target), (v, view) in itertools.product(enumerate(targets), enumerate(logits)):
        if i != v:
            terms.append(-(target * F.log_softmax(view / temperature, dim=-1)).sum(-1).mean())
    return torch.stack(terms).mean(), len(terms)


def test_equals_log_softmax_with_gradient() -> None:
    logits, target = draw(5, 7).requires_grad_(), draw(5, 7, seed=1).softmax(-1)
    ours = soft_cross_entropy(target, logits, 0.1)
    theirs = -(target * F.log_softmax(logits / 0.1, dim=-1)).sum(-1)
    torch.testing.assert_close(ours, theirs)
    factor = draw(5, seed=2)
    for a, b in zip(*(torch.autograd.grad((y * factor).sum(), logits) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(2 * target, s, 0.5, mass=2), logits)


@pytest.mark.parametrize(("teachers", "views", "pairs"), [(2, 12, 22), (2, 10, 18), (2, 2, 2), (1, 4, 3), (3, 3, 6)])
def test_every_teacher_meets_every_other_view_once(teachers: int, views: int, pairs: int) -> None:
    logits, targets = draw(views, 3, 5).requires_grad_(), draw(teachers, 3, 5, seed=1).softmax(-1)
    expected, count = every_pair(targets, logits, 0.1)
    assert count == pairs
    loss = across_views(targets, logits, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, logits)[0] for y in (loss, expected)))


def test_a_view_never_meets_its_own_target() -> None:
    logits, targets = draw(2, 3, 5).requires_grad_(), draw(2, 3, 5, seed=1).softmax(-1).clone()
    (before,) = torch.autograd.grad(across_views(targets, logits, 0.1), logits)
    targets[0] = targets[0].flip(-1)  # target 0 is for view 1 alone
    (after,) = torch.autograd.grad(across_views(targets, logits, 0.1), logits)
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_half_precision_logits_are_worked_in_float32() -> None:
    logits, target = draw(4, 50).half().requires_grad_(), draw(4, 50, seed=1).softmax(-1).half()
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_cross_entropy(target, logits * 30, 0.04)  # up to 2,000 before the softmax
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    loss.sum().backward()
    assert logits.grad.dtype == torch.float16 and logits.grad.isfinite().all()


def test_no_rows_is_no_loss_and_no_nan() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = soft_cross_entropy(torch.zeros(0, 5), logits, 0.1).sum()
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 5)
    assert entropy_share(torch.zeros(0, 5)) == 0


def test_entropy_share_is_one_for_uniform_and_zero_for_one_hot() -> None:
    assert entropy_share(torch.full((3, 8), 1 / 8)) == pytest.approx(1)
    assert entropy_share(torch.eye(8)) == 0
    assert entropy_share(torch.tensor([0.5, 0.5, 0, 0])) == pytest.approx(math.log(2) / math.log(4))
