"""Distillation: the student's features become those of a frozen encoder, or stay near those it started with.

Source: Ranzinger et al., "AM-RADIO", arXiv 2312.06709, for losses and heads; targets standardised over the data as in
Theia (arXiv 2407.20179), UNIC (arXiv 2408.05088) and PHI-S (arXiv 2410.01680). Written from memory of these papers, and
tested against an independent computation:

    loss         = pooled * match(head(s), t; pooled_cosine) + patches * mean over patches match(head'(s_i), t_i; ...)
    match(x, t; c) = c * (1 - cos(x, t)) + (1 - c) * mean over values of smooth L1(x - t)

s are the student's features, t those of the frozen encoder `teacher`. Published: cosine alone for the pooled token, 0.9
cosine and 0.1 smooth L1 for patches; heads of two layers (theirs has a LayerNorm between them, ours has none). Here one
teacher is one entry: several of them are several entries, each with its weight.

Two uses. *A large teacher*: `frozen: {large: {weights: ...}}`, any timm model or exported folder. Other widths meet in
the head, other grids (patch 14 and 16, a Swin's 32) by resampling the teacher's patches to the student's grid. Models
that are neither ViT nor Swin have pooled features only: `patches: 0`. *An anchor* for continued training:
`frozen: {start: {of: student}}` with `head: none`, so that the features themselves stay; with `mask` in the very pass
that another objective runs anyway.

Shapes: V crops, B images, N patches, D width of the student, E width of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nn.gram import resize_patches
from ..nn.heads import Mlp
from ..nn.precision import full_precision, no_autocast
from ..nn.standardise import RunningStandardise
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of


class DistilSettings(ObjectiveSettings):
    """Defaults: a large teacher, pooled token and patches as AM-RADIO matches them."""

    teacher: str = "large"
    """a frozen encoder of the recipe"""
    view: str = "plain"
    """crops of the student"""
    mask: str | None = None
    """a mask of the student's pass, e.g. iBOT's, whose hidden patches then have to be guessed; null: whole crops"""
    teacher_view: str | None = None
    """what the teacher looks at: a larger view made `like` the student's; null: the student's own"""
    pooled: float = Field(1.0, ge=0)
    """weight of the pooled feature (class token or average, what timm pools); 0: not matched"""
    patches: float = Field(1.0, ge=0)
    """weight of the patch features; 0: not matched"""
    pooled_cosine: float = Field(1.0, ge=0, le=1)
    """share of the cosine in the loss of the pooled feature, the rest is smooth L1"""
    patch_cosine: float = Field(0.9, ge=0, le=1)
    """the same for patches"""
    head: Literal["mlp", "linear", "none"] = "mlp"
    """from the student's width to the teacher's; `none`: the features themselves, which needs equal widths"""
    hidden: int = Field(2048, ge=1)
    """width of the hidden layer of `mlp`"""
    targets: Literal["raw", "standardised"] = "raw"
    """`standardised`: every value with mean 0 and deviation 1 over the data, so that no few of them decide"""
    momentum: float = Field(0.99, ge=0, lt=1)
    """of the statistics of standardised targets"""

    @model_validator(mode="after")
    def _something_to_match(self) -> DistilSettings:
        if not self.pooled and not self.patches:
            raise ValueError("pooled and patches are both 0: nothing is matched; give one of them a weight")
        if self.head == "none" and self.targets != "raw":
            raise ValueError("head: none keeps the features themselves: set targets to raw, or head to linear")
        return self


class Distil(Objective):
    """Match the features of a frozen encoder."""

    Config = DistilSettings
    compares_views = False

    def __init__(self, cfg: DistilSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg, seen = cfg, cfg.teacher_view or cfg.view
        _check_fit(cfg, encoder, seen)
        teacher = encoder.of(cfg.teacher)
        self.student = Forward("student", cfg.view, cfg.mask)
        self.target = Forward(cfg.teacher, seen)
        self.needs = (self.student, self.target)
        self.grid, self.teacher_grid = encoder.grids[cfg.view], teacher.grids[seen]
        weights = {"pooled": cfg.pooled, "patches": cfg.patches}
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.heads = nn.ModuleDict({name: _head(cfg, encoder.dim, teacher.dim) for name in self.weights})
        standardised = self.weights if cfg.targets == "standardised" else {}
        self.statistics = nn.ModuleDict({name: RunningStandardise(teacher.dim, cfg.momentum) for name in standardised})

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `pooled` and `patches`: the terms without weight; `..._cosine`: how near the directions are."""
        student, teacher = tokens[self.student], tokens[self.target]
        pairs = {"pooled": (student.cls, teacher.cls), "patches": (student.patches, teacher.patches)}
        shares = {"pooled": self.cfg.pooled_cosine, "patches": self.cfg.patch_cosine}
        logs: dict[str, Tensor] = {}
        for name in self.weights:
            own, target = pairs[name]  # [V*B, D] and [V*B, E], or [V*B, N, D] and [V*B, N', E]
            if name == "patches":
                target = resize_patches(target, self.teacher_grid, self.grid, smooth=True)  # [V*B, N, E]
            target = self.statistics[name](target) if name in self.statistics else target
            logs[name], logs[f"{name}_cosine"] = match(self.heads[name](own), target, shares[name])
        total = torch.stack([weight * logs[name] for name, weight in self.weights.items()]).sum()
        return {"loss": total} | {name: value.detach() for name, value in logs.items()}


def match(predicted: Tensor, target: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(`share` * (1 - cosine) + (1 - share) * smooth L1, the cosine): means over all rows, in float32.

    Args:
        predicted: [..., E].
        target: [..., E], constant.
        share: of the cosine, in 0..1.
    """
    with no_autocast(predicted):
        predicted, target = full_precision(predicted), full_precision(target.detach())
        cosine = F.cosine_similarity(predicted, target, dim=-1).mean()
        loss = share * (1 - cosine)
        if share < 1:
            loss = loss + (1 - share) * F.smooth_l1_loss(predicted, target)
        return loss, cosine


def _head(cfg: DistilSettings, dim: int, out: int) -> nn.Module:
    if cfg.head == "none":
        return nn.Identity()
    dims = (dim, out) if cfg.head == "linear" else (dim, cfg.hidden, out)
    return Mlp(dims, norm=False, last_norm="none", bias=True, last_bias=True, activation=nn.GELU)


def _check_fit(cfg: DistilSettings, encoder: EncoderSpec, seen: str) -> None:
    """ValueError unless the teacher is frozen, fits its view, shows the same crops, and has what is to be matched."""
    if cfg.teacher in ("student", "teacher"):
        raise ValueError(
            f"distil looks at a frozen encoder, not at the {cfg.teacher}: add frozen.large={{weights: NAME}} for a "
            "trained model, or frozen.start={of: student} for the features at the start, and name it in `teacher`"
        )
    teacher = encoder.of(cfg.teacher)
    if crops_of(encoder, cfg.view) != crops_of(encoder, seen):
        raise ValueError(
            f"view {seen!r} has {encoder.crops[seen]} crops, {cfg.view!r} has {encoder.crops[cfg.view]}: set "
            f"views.{seen}.like={cfg.view} and as many crops"
        )
    if seen != cfg.view:
        encoder.require(seen, f"like={cfg.view}")
    if seen in teacher.misfits:
        raise ValueError(
            f"view {seen!r} does not fit frozen.{cfg.teacher}: {teacher.misfits[seen]}. Set frozen.{cfg.teacher}.size "
            "to one of them, and its views are resized"
        )
    pooled = [name for name, spec in ((cfg.teacher, teacher), ("student", encoder)) if spec.family == "pooled"]
    if cfg.patches and pooled:
        raise ValueError(f"{' and '.join(pooled)}: no ViT or Swin, so there are no patches to match: set patches to 0")
    if cfg.head == "none" and encoder.dim != teacher.dim:
        raise ValueError(
            f"head: none needs equal widths, but the student has {encoder.dim} and {cfg.teacher} has {teacher.dim}: "
            "set head to linear or mlp"
        )
