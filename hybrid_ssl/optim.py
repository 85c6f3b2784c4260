from __future__ import annotations

from typing import Literal

from pydantic import Field

from .schedule import Duration, Value
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
    """`after`: the step after the warm-up is the first at full rate (MAE); `at`: the last step of the warm-up is (DINO)"""
    min_lr: float = Field(0.0, ge=0)
    """absolute learning rate at the end"""
    milestones: list[Duration] = []
    """`step` schedule: where lr is multiplied by `gamma`"""
    gamma: float = Field(0.1, gt=0, le=1)
    weight_decay: Value = 0.05
    no_decay: Literal["norm_bias", "norm_bias_tokens", "none"] = "norm_bias"
    """which parameters are spared: `norm_bias`: 1-D ones (MAE, DINO, iBOT: tokens and positions are decayed);
    `norm_bias_tokens`: also class / mask / register tokens, positions, Swin's bias tables (SimMIM on Swin, CMAE);
    `none`: no parameter is (MoCo v3)"""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """lr of encoder layer i is multiplied by layer_decay ** (layers + 1 - i)"""
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD and LARS"""
    trust: float = Field(0.001, gt=0)
    """LARS trust coefficient"""
    clip: ClipSettings | None = None
