import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hybrid_ssl.nn.batchnorm import SyncBatchNorm1d
from hybrid_ssl.nn.heads import DinoHead, Mlp
from hybrid_ssl.nn.prototypes import Prototypes, unit_rows


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def test_defaults_are_mocos_projector() -> None:
    head = Mlp((8, 16, 16, 4))
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, SyncBatchNorm1d, nn.ReLU] * 2 + [nn.Linear, SyncBatchNorm1d]
    assert names(head) == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "6.weight"]


def test_mlp_equals_torch_modules_with_the_same_weights() -> None:
    head = Mlp((8, 16, 4)).double()
    theirs = nn.Sequential(
        nn.Linear(8, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 4, bias=False),
        nn.BatchNorm1d(4, affine=False),
    ).double()
    assert not theirs.load_state_dict(head.state_dict(), strict=False).unexpected_keys
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(head(x), theirs(x))


def test_other_papers_heads() -> None:
    byol = Mlp((8, 16, 4), bias=True, last_norm="none")
    assert names(byol) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    simclr = Mlp((8, 8, 4), last_norm="scale")
    assert names(simclr) == ["0.weight", "1.weight", "1.bias", "3.weight", "4.weight"]
    supcon = Mlp((8, 8, 4), norm=False, last_norm="none", bias=True, last_bias=True)
    assert names(supcon) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    msn = Mlp((8, 16, 4), last_norm="none", bias=True, last_bias=True, activation=nn.GELU)
    assert isinstance(msn[2], nn.GELU)


def test_unit_rows_equals_normalize_with_its_gradient() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, weight)
    torch.testing.assert_close(unit_rows(weight), F.normalize(weight, dim=1))


@pytest.mark.parametrize("rows", [4, 9], ids=["fewer rows than width", "more"])
@pytest.mark.parametrize("free_scale", [False, True])
def test_prototypes_equal_torchs_weight_norm(free_scale: bool, rows: int) -> None:
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False).double(), dim=0)
    ours = Prototypes(5, 7, free_scale).double()
    length = torch.rand(7, 1, dtype=torch.float64) + 0.5 if free_scale else torch.ones(7, 1, dtype=torch.float64)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.copy_(length)
        ours.weight.copy_(theirs.parametrizations.weight.original1)
        if ours.scale is not None:
            ours.scale.copy_(length)
    x, factor = torch.randn(rows, 5, dtype=torch.float64), torch.randn(rows, 7, dtype=torch.float64)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(first), theirs(second))
    (ours(first) * factor).sum().backward()
    (theirs(second) * factor).sum().backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.parametrizations.weight.original1.grad)
    if ours.scale is not None:
        torch.testing.assert_close(ours.scale.grad, theirs.parametrizations.weight.original0.grad)


def test_dino_head_can_be_copied_and_starts_as_published() -> None:
    head = DinoHead(64, 100, hidden=256, bottleneck=32)
    twin = copy.deepcopy(head)
    x = torch.randn(3, 64)
    assert head(x).equal(twin(x)) and head(x).shape == (3, 100)
    weights = [layer.weight for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert len(weights) == 3 and all(0.015 < w.std() < 0.025 and w.abs().max() <= 2 for w in weights)
    assert names(DinoHead(8, 9, 8, 4, norm_last_layer=False))[-2:] == ["prototypes.weight", "prototypes.scale"]
    assert any(isinstance(layer, SyncBatchNorm1d) for layer in DinoHead(8, 9, 8, 4, batchnorm=True).mlp)


def test_logits_are_float32_cosines_in_any_precision() -> None:
    head, x = DinoHead(16, 9, hidden=16, bottleneck=8), torch.randn(5, 16)
    exact = head(x)
    assert exact.abs().max() <= 1 + 1e-6
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            logits = head(x.to(dtype))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, exact, atol=0.05, rtol=0)


def test_a_zero_row_is_no_nan() -> None:
    head = DinoHead(16, 9, hidden=16, bottleneck=8)
    with torch.autocast("cpu", torch.float16):
        assert head(torch.zeros(2, 16)).isfinite().all()


def test_mean_logit_is_the_logit_of_the_mean_embedding() -> None:
    head, x = DinoHead(16, 9, hidden=16, bottleneck=8, norm_last_layer=False).double(), torch.randn(50, 16).double()
    torch.testing.assert_close(head.prototypes(head.embed(x).mean(0)), head(x).mean(0))
