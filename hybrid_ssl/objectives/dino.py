"""DINO: the student's crops predict what a teacher sees in the other, larger crops of the same image.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", arXiv 2104.14294. Written from the
paper and a fact sheet; tested against an independent computation.

    loss = mean over (teacher's global crop i, student's crop v != i) of
           cross-entropy(softmax((t_i - centre) / tau_t), softmax(s_v / tau_s))

The teacher sees the global crops only. The centre is the running mean of its logits over the global batch, moved after
the loss has used the old one. Prototypes have unit length (`norm_last_layer`), and their gradients are dropped for the
first epoch. The teacher moves after the step with that step's momentum (`teacher.offset: 0`, unlike MoCo v3). At the
start of training the loss is near ln(K).

Beyond the paper, `mask` lets the student's global crops be masked, so that DINO shares iBOT's pass.
Shapes: B images, T teacher views, S student views (T global, then the local ones), D encoder width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.center import Center
from ..nn.cross_entropy import across_views, entropy_share
from ..nn.heads import DinoHead
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from ..schedule import Duration, value_at
from .base import Objective, ObjectiveSettings, ParamRule, Temperature, crops_of


class DINOSettings(ObjectiveSettings):
    """Defaults: the official code's for ViT."""

    global_view: str = "global"
    """large crops (paper: 2), which the teacher sees as well"""
    local_view: str | None = "local"
    """small crops for the student (paper: 8 to 10); null: global crops only"""
    mask: str | None = None
    """a mask for the student's global crops; null: none, as in the paper"""
    out_dim: int = Field(65536, ge=2)
    """K, the number of prototypes; fewer for small data sets"""
    hidden: int = Field(2048, ge=1)
    bottleneck: int = Field(256, ge=1)
    norm_last_layer: bool = True
    """keep prototypes at unit length; false: learn their lengths (better on ViT-S, less stable on larger ones)"""
    batchnorm: bool = False
    """BatchNorm in the head (ResNet-50)"""
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: Temperature = 0.04
    """a number or a ramp; {start: 0.04, end: 0.07, over: 30 epochs, per: epoch} for long runs"""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    hold_last_layer: Duration = "1 epochs"
    """how long the prototypes' gradients are dropped"""


class DINO(Objective):
    """Self-distillation of class tokens over multi-crops."""

    Config = DINOSettings

    def __init__(self, cfg: DINOSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.whole = Forward("student", cfg.global_view, cfg.mask)
        self.local = None if cfg.local_view is None else Forward("student", cfg.local_view)
        self.target = Forward("teacher", cfg.global_view)
        self.needs = tuple(need for need in (self.whole, self.local, self.target) if need)
        self.teachers, self.views = count_views(encoder, cfg.global_view, cfg.local_view)
        self.head = DinoHead(
            encoder.dim, cfg.out_dim, cfg.hidden, cfg.bottleneck, cfg.norm_last_layer, batchnorm=cfg.batchnorm
        )
        self.teacher_head = deepcopy(self.head).requires_grad_(False)
        self.center = Center(cfg.out_dim, cfg.center_momentum)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`, and as measures of collapse: `kl` from teacher to student; `teacher_entropy`: of a target;
        `teacher_spread`: of the mean target; both over ln K (both 1: uniform collapse; both 0: one prototype wins)."""
        with torch.no_grad():
            target_logits = self.teacher_head(tokens[self.target].cls)  # [T*B, K]
            targets = self.center.softmax(target_logits, value_at(self.cfg.teacher_temperature, now))

        crops = [tokens[need].cls for need in (self.whole, self.local) if need]
        logits = self.head(torch.cat(crops))  # [S*B, K]

        loss = across_views(
            targets.unflatten(0, (self.teachers, -1)),  # [T, B, K]
            logits.unflatten(0, (self.views, -1)),  # [S, B, K]
            self.cfg.student_temperature,
        )
        self.center.update(target_logits.sum(0), len(target_logits))
        return {"loss": loss, **target_metrics(loss, targets)}

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_head, self.head),)

    def param_rules(self) -> Iterable[ParamRule]:
        return (ParamRule(tuple(self.head.prototypes.parameters()), hold=self.cfg.hold_last_layer),)


def count_views(encoder: EncoderSpec, global_view: str, local_view: str | None) -> tuple[int, int]:
    """(T, S): the teacher's views and the student's.

    Raises:
        ValueError: a view does not exist, or there is no second crop to compare with.
    """
    teachers = crops_of(encoder, global_view)
    local = 0 if local_view is None else crops_of(encoder, local_view)
    if teachers + local < 2:
        raise ValueError(
            f"self-distillation compares crops of an image, but view {global_view!r} has one crop and there is no "
            f"local view: set views.{global_view}.crops to 2, or name a local_view"
        )
    return teachers, teachers + local


@torch.no_grad()
def target_metrics(cross_entropy: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Measures of collapse; `targets` [R, K] are this process's, `cross_entropy` was measured against them."""
    share = entropy_share(targets)
    return {
        "kl": cross_entropy.detach() - share * math.log(targets.shape[-1]),
        "teacher_entropy": share,
        "teacher_spread": entropy_share(targets.mean(0)),
    }
