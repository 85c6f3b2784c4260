"""Rates, groups, clipping, LARS and skipped steps, each against the formula it claims to be."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import Tensor, nn

from hybrid_ssl.assemble import build_groups, build_pretrainer, lay_out
from hybrid_ssl.config import build_recipe
from hybrid_ssl.encoder import build_encoder
from hybrid_ssl.objectives.base import ParamRule
from hybrid_ssl.optim import (
    ClipSettings,
    OptimizerSettings,
    build_optimizer,
    clip_gradients,
    drop_held,
    lr_at,
    param_groups,
    peak_lr,
    set_step,
)
from hybrid_ssl.schedule import Progress, Ramp
from hybrid_ssl.settings import EncoderSettings

STEPS, EPOCH = 60, 5
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "init_values": 0.1}


def at(step: int) -> Progress:
    return Progress(step, STEPS, EPOCH)


def settings(**changes: Any) -> OptimizerSettings:
    return OptimizerSettings.model_validate({"lr": 1.0, "lr_per": None} | changes)


def rates(cfg: OptimizerSettings, peak: float = 1.0) -> list[float]:
    return [lr_at(cfg, peak, at(step)) for step in range(STEPS)]


# learning rates


def test_lr_grows_with_the_batch_by_the_rule_and_says_so() -> None:
    assert peak_lr(settings(lr=1.5e-4, lr_per=256), 4096) == (2.4e-3, "lr 0.00015 x 4096/256 = 0.0024")
    root, sentence = peak_lr(settings(lr=4e-3, lr_per=1024, lr_rule="sqrt"), 2048)
    assert root == pytest.approx(4e-3 * math.sqrt(2)) and "sqrt(2048/1024)" in sentence
    assert peak_lr(settings(lr=0.3), 4096)[0] == 0.3


def test_warmup_and_cosine_are_those_of_mae_and_moco_v3() -> None:
    warm, epochs, low = 3, STEPS / EPOCH, 0.05

    def official(step: int) -> float:  # of the fractional epoch
        epoch = step / EPOCH
        if epoch < warm:
            return 1.0 * epoch / warm
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))

    expected = [official(step) for step in range(STEPS)]
    assert rates(settings(warmup="3 epochs", min_lr=low)) == pytest.approx(expected, rel=1e-12)


def test_warmup_that_ends_at_its_last_step_is_dinos_table() -> None:
    warm, low = 15, 1e-3
    rest = np.arange(STEPS - warm)
    table = np.concatenate(
        (np.linspace(0, 1.0, warm), low + 0.5 * (1.0 - low) * (1 + np.cos(np.pi * rest / len(rest))))
    )
    got = rates(settings(warmup="3 epochs", warmup_ends="at", min_lr=low))
    np.testing.assert_allclose(got, table, rtol=1e-12)


def timm_rates(kind: type, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = kind(optimizer, t_in_epochs=False, warmup_t=15, warmup_lr_init=0.01, **options)
    found = []
    for step in range(STEPS):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_from_the_start_is_simmims() -> None:
    official = timm_rates(CosineLRScheduler, t_initial=STEPS, lr_min=0.05, cycle_limit=1)
    cfg = settings(warmup="15 steps", warmup_start=0.01, min_lr=0.05, cosine_from="start")
    assert rates(cfg) == pytest.approx(official, rel=1e-12)
    assert max(rates(cfg)) < 0.95  # the warm-up leads to 1, the cosine is below it by then


def test_steps_are_simmims() -> None:
    official = timm_rates(MultiStepLRScheduler, decay_t=[30, 45], decay_rate=0.1, warmup_prefix=False)
    official = [0.1 ** ((step >= 30) + (step >= 45)) if step >= 15 else lr for step, lr in enumerate(official)]
    cfg = settings(schedule="step", warmup="3 epochs", warmup_start=0.01, milestones=["50%", "9 epochs"])
    assert rates(cfg) == pytest.approx(official, rel=1e-12)


def test_cosine_laid_over_more_than_the_run_ends_before_its_end() -> None:
    """MSN: all schedules over 1.25 times the run."""
    short = rates(settings(warmup="3 epochs", min_lr=0.01, cosine_to="125%"))
    longer = [lr_at(settings(warmup="3 epochs", min_lr=0.01), 1.0, Progress(step, 75, 5)) for step in range(60)]
    assert short == pytest.approx(longer, rel=1e-12) and short[-1] > 0.05


def test_constant_rate_stays_at_the_peak() -> None:
    assert set(rates(settings(schedule="constant"), peak=0.3)) == {0.3}


# parameter groups


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"vit_tiny": (16, 16)}
        args = VIT | {"reg_tokens": 1}
        self.student = build_encoder(EncoderSettings(name="vit_tiny_patch16_224", args=args), in_chans=3, sizes=sizes)
        self.student.add_mask_token()
        self.head = nn.Linear(32, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def spared(no_decay: str, module: nn.Module) -> set[str]:
    groups = param_groups(settings(no_decay=no_decay), module.named_parameters())
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names)) and not any(name.startswith("frozen") for name in names)
    assert len(names) == sum(p.requires_grad for p in module.parameters())
    return {name for group in groups if group["decay"] == 0.0 for name in group["names"]}


def test_norm_bias_spares_one_dimensional_parameters_only() -> None:
    module = Heads()
    assert spared("norm_bias", module) == {n for n, p in module.named_parameters() if p.ndim == 1 and p.requires_grad}
    assert "student.model.cls_token" not in spared("norm_bias", module)


def test_norm_bias_tokens_spares_tokens_and_positions_too() -> None:
    module = Heads()
    more = spared("norm_bias_tokens", module) - spared("norm_bias", module)
    prefix = "student.model."
    assert more == {f"{prefix}cls_token", f"{prefix}reg_token", f"{prefix}pos_embed", "student.mask_token"}


def test_swins_bias_tables_are_spared_with_the_tokens() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=0
    )
    tables = {name for name, _ in swin.named_parameters() if name.endswith("relative_position_bias_table")}
    assert tables and tables <= spared("norm_bias_tokens", swin) and not tables & spared("norm_bias", swin)


def test_none_spares_nothing() -> None:
    assert spared("none", Heads()) == set()


def test_rules_of_objectives_make_groups_of_their_own() -> None:
    heads = nn.ModuleDict(
        {name: nn.Linear(2, 2, bias=False) for name in ("plain", "held", "slow", "light", "constant")}
    )

    def of(name: str) -> tuple[nn.Parameter, ...]:
        return tuple(heads[name].parameters())

    rules = [
        ParamRule(of("held"), hold="1 epochs"),
        ParamRule(of("slow"), lr_scale=0.1),
        ParamRule(of("light"), weight_decay=0.5),
        ParamRule(of("constant"), constant_lr=True),
    ]
    cfg = settings(weight_decay=0.05)
    optimizer = build_optimizer(cfg, param_groups(cfg, heads.named_parameters(), rules))
    assert len(optimizer.param_groups) == 5
    lr, decay = set_step(cfg, optimizer, 1.0, at(30))
    assert (lr, decay) == pytest.approx((0.5, 0.05))
    found = {group["names"][0].split(".")[0]: group for group in optimizer.param_groups}
    assert [found[name]["lr"] for name in heads] == pytest.approx([0.5, 0.5, 0.05, 0.5, 1.0])
    assert [found[name]["weight_decay"] for name in heads] == [0.05, 0.05, 0.05, 0.5, 0.05]
    for step, dropped in [(4, True), (5, False)]:
        heads.requires_grad_(True)
        sum(p.sum() for p in heads.parameters()).backward()  # type: ignore[union-attr]
        drop_held(optimizer, at(step))
        assert (heads["held"].weight.grad is None) == dropped and heads["plain"].weight.grad is not None


def test_one_dimensional_parameters_can_have_a_rate_of_their_own() -> None:
    cfg = settings(name="lars", vector_lr_scale=0.024)  # Barlow Twins: 0.0048 beside 0.2
    head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = build_optimizer(cfg, param_groups(cfg, head.named_parameters(), [], lambda name: 0.5))
    set_step(cfg, optimizer, 0.4, at(0))
    found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert found.pop("0.weight") == 0.2
    assert list(found.values()) == pytest.approx([0.0048] * 3) and found.keys() == {"0.bias", "1.weight", "1.bias"}


def test_weight_decay_follows_its_ramp_and_leaves_the_spared_alone() -> None:
    cfg = settings(weight_decay=Ramp(start=0.04, end=0.4, shape="cosine"))
    linear = nn.Linear(2, 2)
    optimizer = build_optimizer(cfg, param_groups(cfg, linear.named_parameters()))
    set_step(cfg, optimizer, 1.0, at(30))
    found = {group["names"][0]: group["weight_decay"] for group in optimizer.param_groups}
    assert found == pytest.approx({"weight": 0.22, "bias": 0.0})


def test_layer_decay_is_maes_power_on_a_vit() -> None:
    sizes = {"v": (16, 16)}
    encoder = build_encoder(
        EncoderSettings(name="vit_tiny_patch16_224", args=VIT | {"depth": 4}), in_chans=3, sizes=sizes
    )
    encoder.add_mask_token()
    ids, last = encoder.layer_ids()

    def official(name: str) -> int:  # the id in MAE's fine-tuning, of 4 blocks and a last layer 5
        if any(part in name for part in ("cls_token", "mask_token", "pos_embed", "patch_embed")):
            return 0
        return int(name.split(".")[2]) + 1 if ".blocks." in name else 5

    assert last == 5
    assert {name: ids[name] for name, _ in encoder.named_parameters()} == {
        name: official(name) for name, _ in encoder.named_parameters()
    }


def test_patch_embedding_steps_slower_also_below_layer_decay() -> None:
    """DINOv2: 0.2 x 0.9 ** 5 for the stem of 4 blocks, 0.9 ** 5 for the tokens, 1 for the last norm and the heads."""
    raw = {
        "run": {"length": "1 steps", "batch_size": 2, "out": "-"},
        "encoder": {"name": "vit_tiny_patch16_224", "args": VIT | {"depth": 4}},
        "data": {"source": "embedded:fashion_mnist"},
        "views": {"plain": {"size": 16}},
        "masks": {"units": {"kind": "random", "view": "plain", "ratio": 0.5}},
        "objectives": {"simmim": {"view": "plain"}},
        "optimizer": {"lr": 1.0, "patch_embed_lr": 0.2},
    }
    for decay in (None, 0.9):
        recipe = build_recipe(raw | {"optimizer": {"lr": 1.0, "patch_embed_lr": 0.2, "layer_decay": decay}})
        pretrainer = build_pretrainer(recipe, [0.5] * 3, [0.5] * 3, layout=lay_out(recipe, 1))
        scale = {name: g["lr_scale"] for g in build_groups(recipe, pretrainer) for name in g["names"]}
        first = 1.0 if decay is None else 0.9**5
        assert scale["student.model.patch_embed.proj.weight"] == pytest.approx(0.2 * first)
        assert scale["student.model.cls_token"] == scale["student.mask_token"] == pytest.approx(first)
        assert scale["student.model.norm.weight"] == scale["objectives.simmim.head.weight"] == 1.0


# clipping


def parts() -> list[list[nn.Parameter]]:
    """Two modules of two tensors with gradients of very different size, and one without gradient."""
    draw = torch.Generator().manual_seed(0)
    made = [[nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in range(2)] for _ in range(2)]
    for i, module in enumerate(made):
        for j, parameter in enumerate(module):
            parameter.grad = torch.randn(3, 2, generator=draw, dtype=torch.float64) * 10.0 ** (i + j - 1)
    made[0].append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    return made


def grads(modules: list[list[nn.Parameter]]) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module if p.grad is not None]


@pytest.mark.parametrize("per", ["model", "tensor", "module"])
def test_clipping_is_the_plain_formula(per: str) -> None:
    limit, before = 1.0, grads(parts())
    sizes = {
        "model": [torch.cat([g.flatten() for g in before]).norm()] * 4,
        "tensor": [g.norm() for g in before],
        "module": [torch.cat([g.flatten() for g in before[i : i + 2]]).norm() for i in (0, 0, 2, 2)],
    }[per]
    expected = [g * min(1.0, limit / (float(size) + 1e-6)) for g, size in zip(before, sizes, strict=True)]
    modules = parts()
    norm = clip_gradients(ClipSettings.model_validate({"norm": limit, "per": per}), modules)
    torch.testing.assert_close(grads(modules), expected, rtol=1e-12, atol=0)
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in before]).norm()))  # before clipping


def test_without_clipping_gradients_are_measured_only() -> None:
    modules, before = parts(), grads(parts())
    assert clip_gradients(None, modules) > 1
    assert all(torch.equal(a, b) for a, b in zip(grads(modules), before, strict=True))


# optimizers


def model_and_optimizer(name: str, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer, OptimizerSettings]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    cfg = settings(name=name, schedule="constant", weight_decay=0.1, **changes)
    return model, build_optimizer(cfg, param_groups(cfg, model.named_parameters())), cfg


def test_lars_is_the_formula_of_moco_v3() -> None:
    model, optimizer, cfg = model_and_optimizer("lars", momentum=0.8, trust=0.02)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    moments = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(3):
        set_step(cfg, optimizer, 0.3, at(step))
        model(torch.full((2, 4), 1.0 + step).double()).square().sum().backward()
        direction = model.weight.grad + 0.1 * weight
        moments[0] = 0.8 * moments[0] + direction * 0.02 * weight.norm() / direction.norm()
        moments[1] = 0.8 * moments[1] + model.bias.grad  # neither decayed nor adapted
        weight, bias = weight - 0.3 * moments[0], bias - 0.3 * moments[1]
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close((model.weight.detach(), model.bias.detach()), (weight, bias), rtol=1e-12, atol=0)


def test_lars_adapts_a_parameter_whose_decay_an_objective_replaced() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    cfg = settings(name="lars", trust=0.01, momentum=0.0)
    optimizer = build_optimizer(cfg, param_groups(cfg, [("weight", weight)], [ParamRule((weight,), weight_decay=1e-6)]))
    set_step(cfg, optimizer, 1.0, at(0))
    weight.grad = torch.full_like(weight, 5.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.99))  # trust x |w|, not 5


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return {"parameters": [p.detach().clone() for p in model.parameters()], "state": state}


@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_skipped_step_changes_no_bit(name: str, first: bool) -> None:
    model, optimizer, cfg = model_and_optimizer(name)
    twin, twin_optimizer, _ = model_and_optimizer(name)

    def step(m: nn.Module, o: torch.optim.Optimizer, number: int, scale: float = 1.0) -> None:
        set_step(cfg, o, 0.1, at(number))
        (m(torch.full((2, 4), 1.0 + number).double()).square().sum() * scale).backward()
        norm = clip_gradients(ClipSettings(norm=1.0), [list(m.parameters())])
        o.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  as in Run.step
        o.step()
        o.zero_grad()

    for number in range(0 if first else 2):
        step(model, optimizer, number)
        step(twin, twin_optimizer, number)
    before = everything(model, optimizer)
    step(model, optimizer, 2, math.nan)
    if not first:
        torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)
    for number in (3, 4):  # as if nothing had been
        step(model, optimizer, number)
        step(twin, twin_optimizer, number)
    torch.testing.assert_close(everything(model, optimizer), everything(twin, twin_optimizer), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_held_parameters_keep_value_moments_and_count(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"free": nn.Linear(2, 2, bias=False), "held": nn.Linear(2, 2, bias=False)})
    cfg = settings(name=name, schedule="constant")
    rule = ParamRule(tuple(model["held"].parameters()), hold="2 steps")
    optimizer = build_optimizer(cfg, param_groups(cfg, model.named_parameters(), [rule]))
    before = model["held"].weight.detach().clone()
    for step in range(3):
        set_step(cfg, optimizer, 0.1, at(step))
        sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        drop_held(optimizer, at(step))
        optimizer.step()
        optimizer.zero_grad()
        held = step < 2
        assert torch.equal(model["held"].weight, before) == held
        assert (model["held"].weight in optimizer.state) != held
    if name == "adamw":
        counts = {n: float(optimizer.state[m.weight]["step"]) for n, m in model.items()}
        assert counts == {"free": 3.0, "held": 1.0}
