"""Parameter rules, the learning-rate schedule, clipping, and LARS.

Learning rate and weight decay of a step are pure functions of the step, so nothing of a schedule is ever restored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .objectives.base import ParamRule
from .schedule import Duration, Progress, Value, to_steps, value_at, within
from .settings import Settings


class ClipSettings(Settings):
    """Gradient clipping, in the forms that the papers use."""

    norm: float = Field(gt=0)
    per: Literal["model", "tensor", "module"] = "model"
    """`model`: global norm (MAE family, SimMIM); `tensor`: each parameter by itself (DINO, iBOT); `module`: encoder and
    each objective by itself (DINOv2)"""


class OptimizerSettings(Settings):
    """Optimizer, learning rate and weight decay."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = Field(gt=0, le=100)
    lr_per: int | None = Field(256, ge=1)
    """`lr` is for that many images: the run uses lr x batch_size / lr_per; null: `lr` is absolute"""
    lr_rule: Literal["linear", "sqrt"] = "linear"
    """how lr grows with the batch; `sqrt`: DINOv2, lr x sqrt(batch_size / lr_per)"""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup: Duration = "0%"
    warmup_start: float = Field(0.0, ge=0)
    """absolute learning rate of the first step"""
    warmup_ends: Literal["after", "at"] = "after"
    """`after`: the step after the warm-up is the first at full rate (MAE); `at`: the warm-up's last step is (DINO)"""
    min_lr: float = Field(0.0, ge=0)
    """absolute learning rate at the end"""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """where the cosine begins: at the end of the warm-up (MAE, MoCo v3, DINO), or at the start of the run with the
    warm-up laid over it, so that it never reaches the full rate (SimMIM and Swin, through timm's default)"""
    cosine_to: Duration = "100%"
    """where the cosine would reach `min_lr`; beyond 100 % the run ends before (MSN: 125%)"""
    milestones: list[Duration] = []
    """`step` schedule: where lr is multiplied by `gamma`"""
    gamma: float = Field(0.1, gt=0, le=1)
    weight_decay: Annotated[Value, within(0, 10)] = 0.05
    no_decay: Literal["norm_bias", "norm_bias_tokens", "none"] = "norm_bias"
    """which parameters are spared: `norm_bias`: 1-D ones (MAE, DINO, iBOT: tokens and positions are decayed);
    `norm_bias_tokens`: also class / mask / register tokens, positions, Swin's bias tables (SimMIM on Swin, CMAE);
    `none`: no parameter is (MoCo v3)"""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """lr of encoder layer i is multiplied by layer_decay ** (layers + 1 - i)"""
    patch_embed_lr: float = Field(1.0, gt=0, le=1)
    """lr of the patch embedding is multiplied by it as well (DINOv2: 0.2)"""
    hold_encoder: Duration | None = None
    """how long an encoder with `init` stays as it is, while new heads, decoder and mask token learn: their first
    gradients say nothing about images yet. Then its lr grows from 0, over as many steps as `warmup` has"""
    vector_lr_scale: float = Field(1.0, gt=0)
    """factor on the learning rate of 1-D parameters (Barlow Twins: 0.024 with LARS, which does not adapt them)"""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD and LARS"""
    trust: float = Field(0.001, gt=0)
    """LARS trust coefficient"""
    clip: ClipSettings | None = None


def peak_lr(cfg: OptimizerSettings, batch_size: int) -> tuple[float, str]:
    """The learning rate after warm-up, and the sentence that says how it was scaled."""
    if cfg.lr_per is None:
        return cfg.lr, f"lr {cfg.lr:g} (absolute)"
    ratio = batch_size / cfg.lr_per
    if cfg.lr_rule == "sqrt":
        lr = cfg.lr * math.sqrt(ratio)
        return lr, f"lr {cfg.lr:g} x sqrt({batch_size}/{cfg.lr_per}) = {lr:g}"
    return cfg.lr * ratio, f"lr {cfg.lr:g} x {batch_size}/{cfg.lr_per} = {cfg.lr * ratio:g}"


def lr_at(cfg: OptimizerSettings, peak: float, now: Progress) -> float:
    """Learning rate of one optimizer step."""
    warmup = to_steps(cfg.warmup, now.total_steps, now.steps_per_epoch)
    if now.step < warmup:
        last = warmup - 1 if cfg.warmup_ends == "at" else warmup
        return cfg.warmup_start + (peak - cfg.warmup_start) * (now.step / last if last > 0 else 1.0)
    if cfg.schedule == "constant":
        return peak
    if cfg.schedule == "step":
        passed = sum(now.step >= to_steps(m, now.total_steps, now.steps_per_epoch) for m in cfg.milestones)
        return float(peak * cfg.gamma**passed)
    begin = warmup if cfg.cosine_from == "warmup" else 0.0
    end = to_steps(cfg.cosine_to, now.total_steps, now.steps_per_epoch)
    done = (now.step - begin) / max(1.0, end - begin)
    return cfg.min_lr + (peak - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


TOKENS = ("cls_token", "mask_token", "reg_token", "dist_token", "pos_embed", "relative_position_bias_table")


def param_groups(
    cfg: OptimizerSettings,
    named: Iterable[tuple[str, nn.Parameter]],
    rules: Sequence[ParamRule] = (),
    layer: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Parameters in groups of equal treatment.

    Args:
        cfg: the recipe's section.
        named: (name, parameter); frozen ones are left out.
        rules: exceptions of the objectives.
        layer: name -> lr factor of layer-wise decay.

    Returns:
        groups with `params`, `names`, `lr_scale`, `decay` (None: the run's weight decay; a number replaces it),
        `constant_lr`, `hold` (a duration, or None) and `warm`.
    """
    exception = {id(p): rule for rule in rules for p in rule.params}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        rule = exception.get(id(parameter), ParamRule(()))
        decay = rule.weight_decay if rule.weight_decay is not None else 0.0 if _spared(cfg, name, parameter) else None
        scale = layer(name) * rule.lr_scale * (cfg.vector_lr_scale if parameter.ndim <= 1 else 1.0)
        key = (scale, decay, rule.constant_lr, rule.hold, rule.warm)
        fields = dict(zip(("lr_scale", "decay", "constant_lr", "hold", "warm"), key, strict=True))
        group = groups.setdefault(key, {"params": [], "names": []} | fields)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _spared(cfg: OptimizerSettings, name: str, parameter: nn.Parameter) -> bool:
    if cfg.no_decay == "none":
        return False
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return True
    return cfg.no_decay == "norm_bias_tokens" and name.rsplit(".", 1)[-1] in TOKENS


def build_optimizer(cfg: OptimizerSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer, fused where torch has it; `set_step` gives every step's rates."""
    if cfg.name == "adamw":
        return torch.optim.AdamW(
            groups, lr=0.0, betas=(cfg.betas[0], cfg.betas[1]), eps=cfg.eps, weight_decay=0.0, fused=True
        )
    if cfg.name == "sgd":
        return Sgd(groups, lr=0.0, momentum=cfg.momentum, weight_decay=0.0, fused=True)
    return Lars(groups, momentum=cfg.momentum, trust=cfg.trust)


def set_step(
    cfg: OptimizerSettings, optimizer: torch.optim.Optimizer, peak: float, now: Progress
) -> tuple[float, float]:
    """Write this step's learning rates and weight decays into the groups; returns the base values."""
    lr, decay = lr_at(cfg, peak, now), value_at(cfg.weight_decay, now)
    for group in optimizer.param_groups:
        group["lr"] = (peak if group["constant_lr"] else lr) * group["lr_scale"] * _warmed(cfg, group, now)
        group["weight_decay"] = decay if group["decay"] is None else group["decay"]
    return lr, decay


def _warmed(cfg: OptimizerSettings, group: dict[str, Any], now: Progress) -> float:
    """Factor on the learning rate of parameters that warm up by themselves after they were held."""
    if not group.get("warm"):  # groups of older checkpoints do not have it
        return 1.0
    held, warmup = (to_steps(text, now.total_steps, now.steps_per_epoch) for text in (group["hold"], cfg.warmup))
    return min(1.0, max(0.0, now.step - held) / warmup) if warmup else 1.0


def drop_held(optimizer: torch.optim.Optimizer, now: Progress) -> None:
    """Set gradients of held parameters to None, so that neither they nor their moments and step counts move."""
    for group in optimizer.param_groups:
        if group["hold"] and now.step < to_steps(group["hold"], now.total_steps, now.steps_per_epoch):
            for parameter in group["params"]:
                parameter.grad = None


def clip_gradients(cfg: ClipSettings | None, modules: Sequence[Sequence[nn.Parameter]]) -> Tensor:
    """Clip in place; returns the global gradient norm before clipping, still on the device.

    Args:
        cfg: how; None only measures.
        modules: the parameters, one sequence for the encoder and for each objective.
    """
    gradients = [[p.grad for p in part if p.grad is not None] for part in modules]
    flat = [gradient for part in gradients for gradient in part]
    if cfg is not None and cfg.per == "tensor":
        norms = torch._foreach_norm(flat)
        # 1e-6: as torch and the official DINO code
        torch._foreach_mul_(flat, [(cfg.norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
        return torch.stack(norms).norm()
    total = torch.nn.utils.get_total_norm(flat)
    for part, own in zip(modules, gradients, strict=True):
        if cfg is not None and own:
            norm = total if cfg.per == "model" else torch.nn.utils.get_total_norm(own)
            torch.nn.utils.clip_grads_with_norm_(part, cfg.norm, norm)
    return total


class Sgd(torch.optim.SGD):
    """torch's, with a momentum that begins as zeros: fused, it is left uninitialised when the first step is skipped."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive SGD (arXiv:1708.03888), in the form of MoCo v3, Barlow Twins and VICReg.

    d = g + wd * w, scaled by trust * |w| / |d|, then accumulated into the momentum; lr comes last. Parameters without
    weight decay by rule (1-D ones) are neither decayed nor scaled. SwAV's LARC differs: it exempts nothing.
    """

    def __init__(self, params: Any, lr: float = 0.0, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "trust": trust, "decay": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        # as in torch's fused optimizers: 1.0 leaves everything as it is
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, skip)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], skip: Tensor | None) -> None:
        direction = parameter.grad
        assert direction is not None
        if group["decay"] != 0.0:  # 0.0 marks the spared ones
            direction = direction.add(parameter, alpha=group["weight_decay"])
            norm, size = direction.norm(), parameter.norm()
            scale = torch.where((norm > 0) & (size > 0), group["trust"] * size / norm, torch.ones_like(norm))
            direction = direction * scale
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        moved = buffer * group["momentum"] + direction
        change = moved * group["lr"]
        if skip is not None:  # `where`, no product: 0 x NaN is NaN
            moved = torch.where(skip > 0, buffer, moved)
            change = torch.where(skip > 0, 0.0, change)
        parameter.sub_(change)
        buffer.copy_(moved)
