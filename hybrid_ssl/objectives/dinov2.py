"""DINOv2: iBOT with heads of their own, Sinkhorn targets, and features that are kept apart by KoLeo.

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193, and for
`local_weight` Simeoni et al., "DINOv3", arXiv 2508.10104. Written from the papers and a fact sheet; tested against an
independent computation.

    loss = class term: mean over pairs (teacher's global crop i, student's crop v != i) of cross-entropy, as in `dino`;
                       2 global and 8 local crops make 2 + 16 = 18 pairs
         + patch term: sum over hidden patches of cross-entropy / (hidden patches of their crop) / (all global crops)
         + koleo_weight * sum over global crops of KoLeo of the student's class tokens, before the head

The student's global crops are masked, each crop's own share and some not at all (`masks`: `kind: block`, `stratified:
true`); a crop without hidden patches adds 0 to the patch term and stays in its denominator. Targets are balanced by
Sinkhorn (released ViT-L/14 and larger) or centred (ViT-L/16 on ImageNet-1k); the centre of the patches is that of
hidden ones only, unlike iBOT's. KoLeo compares images, never two crops of one. The teacher moves after the step
(`teacher.offset: 0`); gradients are clipped per module (`optimizer.clip.per: module`).

Known differences: held prototypes lose their gradient instead of stepping with a rate of 0; stochastic depth grows with
depth and is drawn per image (released: one rate, exact subsets of the batch); the mask token does not start at zero;
both heads are one module when gradients are clipped.
Shapes: B images, T teacher views, S student views (T global, then local), N patches, n hidden ones in all crops of the
micro-batch, D encoder width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nn.center import Center
from ..nn.cross_entropy import across_views, entropy_share, soft_cross_entropy
from ..nn.heads import DinoHead
from ..nn.koleo import Among, koleo
from ..nn.sinkhorn import sinkhorn
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from ..schedule import Duration, Ramp, Value, value_at
from .base import Objective, ObjectiveSettings, ParamRule, Temperature
from .dino import count_views, target_metrics


class DINOv2Settings(ObjectiveSettings):
    """Defaults: the released ViT-L/14 run's; `dinov2_vitl.yaml` has those of ViT-L/16 on ImageNet-1k."""

    global_view: str = "global"
    """large crops (paper: 2), which the teacher sees as well"""
    local_view: str | None = "local"
    """small crops for the class term (paper: 8); null: global crops only"""
    mask: str = "block"
    """a mask of the global view; it may hide other numbers of patches in each crop, or none"""
    targets: Literal["sinkhorn", "center"] = "sinkhorn"
    """how the teacher's logits become targets that use all prototypes"""
    sinkhorn_iterations: int = Field(3, ge=1)
    class_weight: float = Field(1.0, gt=0)
    patch_weight: float = Field(1.0, gt=0)
    koleo_weight: float = Field(0.1, ge=0)
    koleo_among: Among = "all"
    """`all`: an image's neighbour is looked for in the micro-batches of all processes, so that their number changes
    nothing; `process`: in its own, as released (32 to 64 images)"""
    local_weight: Value = 1.0
    """factor of the local crops' pairs; DINOv3 halves it when Gram anchoring begins"""
    shared_head: bool = False
    """one head for classes and patches (ViT-L/16 on ImageNet-1k)"""
    out_dim: int = Field(131072, ge=2)
    """K, the number of prototypes"""
    patch_out_dim: int | None = Field(None, ge=2)
    """prototypes of the patch head; null: as many as `out_dim`"""
    hidden: int = Field(2048, ge=1)
    bottleneck: int = Field(384, ge=1)
    patch_bottleneck: int | None = Field(None, ge=1)
    """null: as wide as `bottleneck` (ViT-L/14: 256)"""
    norm_last_layer: bool = False
    """keep prototypes at unit length; false: learn their lengths"""
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: Temperature = Ramp(start=0.04, end=0.07, over="30%")
    """of class and patch targets; the published 37,500 steps are 30 % of 125,000"""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    """with `targets: center`"""
    hold_last_layer: Duration = "1%"
    """how long the prototypes' gradients are dropped; published: 1,250 of 125,000 steps"""

    @model_validator(mode="after")
    def _a_shared_head_is_one(self) -> DINOv2Settings:
        own = {"patch_out_dim": self.patch_out_dim, "patch_bottleneck": self.patch_bottleneck}
        given = [name for name, value in own.items() if value is not None]
        if self.shared_head and given:
            raise ValueError(f"a shared head has no {' and '.join(given)}: leave it out, or set shared_head: false")
        return self


class DINOv2(Objective):
    """Self-distillation of class tokens and hidden patches, with spread features."""

    Config = DINOv2Settings

    def __init__(self, cfg: DINOv2Settings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        self.masked = Forward("student", cfg.global_view, cfg.mask)
        self.local = None if cfg.local_view is None else Forward("student", cfg.local_view)
        self.target = Forward("teacher", cfg.global_view)
        self.needs = tuple(need for need in (self.masked, self.local, self.target) if need)
        self.teachers, self.views = count_views(encoder, cfg.global_view, cfg.local_view)
        self.heads = Heads(cfg, encoder.dim)
        self.teacher_heads = deepcopy(self.heads).requires_grad_(False)
        self.center: Center | None = None
        self.patch_center: Center | None = None
        if cfg.targets == "center":
            self.center = Center(cfg.out_dim, cfg.center_momentum)
            self.patch_center = Center(cfg.patch_out_dim or cfg.out_dim, cfg.center_momentum)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`, its terms `class_loss`, `patch_loss` and `koleo`, DINO's measures of collapse, and the patches' mean
        entropy."""
        cfg, mask = self.cfg, batch.masks[self.cfg.mask]
        rows = batch.hidden_rows(cfg.mask)  # [n]
        masked, target = tokens[self.masked], tokens[self.target]
        assert mask.shape == target.patches.shape[:2], f"mask {mask.shape}, patches {target.patches.shape}"

        with torch.no_grad():
            hidden = target.patches.flatten(0, 1).index_select(0, rows)  # [n, D]
            class_logits, patch_logits = self.teacher_heads(target.cls, hidden)  # [T*B, K], [n, K]
            temperature = value_at(cfg.teacher_temperature, now)
            targets = self._targets(class_logits, temperature, self.center)
            patch_targets = self._targets(patch_logits, temperature, self.patch_center)

        crops = [tokens[need].cls for need in (self.masked, self.local) if need]
        hidden = masked.patches.flatten(0, 1).index_select(0, rows)
        logits, hidden_logits = self.heads(torch.cat(crops), hidden)  # [S*B, K], [n, K]

        each_class = across_views(
            targets.unflatten(0, (self.teachers, -1)),  # [T, B, K]
            logits.unflatten(0, (self.views, -1)),  # [S, B, K]
            cfg.student_temperature,
            value_at(cfg.local_weight, now),
        )
        each_patch = patch_loss(patch_targets, hidden_logits, rows, mask, cfg.student_temperature)
        loss = cfg.class_weight * each_class + cfg.patch_weight * each_patch
        logs = {"class_loss": each_class.detach(), "patch_loss": each_patch.detach()}
        if cfg.koleo_weight:
            spread = spread_loss(masked.cls.unflatten(0, (self.teachers, -1)), cfg.koleo_among)
            loss, logs["koleo"] = loss + cfg.koleo_weight * spread, spread.detach()
        logs |= target_metrics(each_class, targets) | {"patch_entropy": entropy_share(patch_targets)}
        return {"loss": loss, **logs}

    def _targets(self, logits: Tensor, temperature: float, center: Center | None) -> Tensor:
        """Targets of the teacher's logits; the centre moves after its old value was used. [R, K] -> [R, K]"""
        if center is None:
            return sinkhorn(logits, temperature, self.cfg.sinkhorn_iterations)
        targets = center.softmax(logits, temperature)
        center.update(logits.sum(0), len(logits))
        return targets

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_heads, self.heads),)

    def param_rules(self) -> Iterable[ParamRule]:
        return (ParamRule(tuple(self.heads.last_layers()), hold=self.cfg.hold_last_layer),)


def patch_loss(targets: Tensor, logits: Tensor, rows: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of hidden patches, every crop with the same weight: sum / (hidden of the crop) / (all crops).

    Args:
        targets: [n, K] probabilities of the hidden patches, crop after crop.
        logits: [n, K] of the student.
        rows: [n] places of the hidden patches in [R*N] (`Batch.hidden_rows`).
        mask: [R, N] bool; crops without hidden patches count in R.
        temperature: of the student.
    """
    each = soft_cross_entropy(targets, logits, temperature)  # [n]
    share = mask.sum(1).clamp(min=1).to(each.dtype).reciprocal()  # [R]
    return (each * share[rows // mask.shape[1]]).sum() / len(mask)


def spread_loss(cls: Tensor, among: Among = "process") -> Tensor:
    """KoLeo of each crop by itself, summed over crops: two crops of an image never flee from each other. [V, B, D]"""
    return torch.stack([koleo(crop, among) for crop in cls.unbind(0)]).sum()


class Heads(nn.Module):
    """The class head, and the patch head unless both are one."""

    def __init__(self, cfg: DINOv2Settings, dim: int) -> None:
        super().__init__()

        def head(prototypes: int, bottleneck: int) -> DinoHead:
            return DinoHead(dim, prototypes, cfg.hidden, bottleneck, cfg.norm_last_layer)

        self.cls = head(cfg.out_dim, cfg.bottleneck)
        self.patch: DinoHead | None = None
        if not cfg.shared_head:
            self.patch = head(cfg.patch_out_dim or cfg.out_dim, cfg.patch_bottleneck or cfg.bottleneck)

    def forward(self, cls: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[C, D], [n, D] -> logits [C, K], [n, K]."""
        if self.patch is not None:
            return self.cls(cls), self.patch(hidden)
        classes, patches = self.cls(torch.cat((cls, hidden))).split((len(cls), len(hidden)))
        return classes, patches

    def last_layers(self) -> Iterable[nn.Parameter]:
        yield from self.cls.prototypes.parameters()
        if self.patch is not None:
            yield from self.patch.prototypes.parameters()
