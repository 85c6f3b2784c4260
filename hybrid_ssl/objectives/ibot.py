"""iBOT: DINO on class tokens, and the same on masked patches, whose targets are the teacher's tokens of the whole crop.

Source: Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv 2111.07832. Written from the paper and
a fact sheet; tested against an independent computation.

    loss = lambda1 * class term (as in `dino`; the student's global crops are masked, the local ones are not)
         + lambda2 * mean over global crops of mean over the crop's hidden patches of
                     cross-entropy(softmax((t - patch centre) / tau_t), softmax(s / tau_s))

A crop without hidden patches contributes 0 and stays in the mean over crops, as published. The patch centre is the mean
logit of *all* teacher patches, hidden or not. Equal in value to the published form, at less cost: the prototypes see
hidden patches only, and the mean logit of all patches is computed as the logit of their mean embedding (the last layer
has no bias). Swin works too: masks are given on the grid of output tokens.

With `shared_head` classes and patches share MLP and prototypes (all released models); without, they share the MLP and
have prototypes of their own. The teacher moves after the step with that step's momentum (`teacher.offset: 0`).
Shapes: B images, T teacher views, S student views (T global, then local), N patches, n hidden ones in all crops of the
micro-batch, D encoder width, d bottleneck width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..nn.center import Center
from ..nn.cross_entropy import across_views, entropy_share, soft_cross_entropy
from ..nn.heads import DinoHead
from ..nn.prototypes import Prototypes
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from ..schedule import Duration, Ramp, value_at
from .base import Objective, ObjectiveSettings, ParamRule, Temperature
from .dino import count_views, target_metrics

_WARMED = Ramp(start=0.04, end=0.07, over="30 epochs", per="epoch")


class IBOTSettings(ObjectiveSettings):
    """Defaults: the released ViT runs'."""

    global_view: str = "global"
    """large crops (paper: 2), which the teacher sees as well"""
    local_view: str | None = "local"
    """small crops for the class term (paper: 10); null: global crops only"""
    mask: str = "block"
    """a mask of the global view; it may hide other numbers of patches in each crop, or none"""
    lambda1: float = Field(1.0, ge=0)
    """factor of the class term; 0 leaves it out, and with it the local crops"""
    lambda2: float = Field(1.0, gt=0)
    """factor of the patch term"""
    shared_head: bool = True
    """one set of prototypes for classes and patches"""
    out_dim: int = Field(8192, ge=2)
    """K, the number of prototypes"""
    patch_out_dim: int | None = Field(None, ge=2)
    """prototypes of the patches, where they have their own; null: as many as `out_dim`"""
    hidden: int = Field(2048, ge=1)
    bottleneck: int = Field(256, ge=1)
    norm_last_layer: bool = True
    """keep prototypes at unit length; false: learn their lengths (released ViT-S and Swin-T)"""
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: Temperature = _WARMED
    """of the class targets"""
    patch_temperature: Temperature = _WARMED
    """of the patch targets"""
    center_momentum: float = Field(0.9, ge=0, lt=1)
    patch_center_momentum: float = Field(0.9, ge=0, lt=1)
    hold_last_layer: Duration = "1 epochs"
    """how long the prototypes' gradients are dropped"""

    @model_validator(mode="after")
    def _heads_fit(self) -> IBOTSettings:
        if self.shared_head and self.patch_out_dim not in (None, self.out_dim):
            raise ValueError(
                f"a shared head has one number of prototypes, but out_dim is {self.out_dim} and patch_out_dim "
                f"{self.patch_out_dim}: leave patch_out_dim out, or set shared_head: false"
            )
        if not self.shared_head and self.lambda1 == 0:
            raise ValueError("lambda1: 0 leaves no class head to be apart from: set shared_head: true")
        return self


class IBOT(Objective):
    """Self-distillation of class tokens and masked patches."""

    Config = IBOTSettings

    def __init__(self, cfg: IBOTSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        local_view = cfg.local_view if cfg.lambda1 else None
        self.masked = Forward("student", cfg.global_view, cfg.mask)
        self.local = None if local_view is None else Forward("student", local_view)
        self.target = Forward("teacher", cfg.global_view)
        self.needs = tuple(need for need in (self.masked, self.local, self.target) if need)
        if cfg.lambda1:
            self.teachers, self.views = count_views(encoder, cfg.global_view, local_view)
            self.center = Center(cfg.out_dim, cfg.center_momentum)
        patch_dim = cfg.patch_out_dim or cfg.out_dim
        self.patch_center = Center(patch_dim, cfg.patch_center_momentum)
        self.head = IBOTHead(cfg, encoder.dim, None if cfg.shared_head else patch_dim)
        self.teacher_head = deepcopy(self.head).requires_grad_(False)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`, its terms `class_loss` and `patch_loss`, DINO's measures of collapse, and the patches' entropy."""
        rows, mask = batch.hidden_rows(self.cfg.mask), batch.masks[self.cfg.mask]  # [n], [T*B, N]
        masked, target = tokens[self.masked], tokens[self.target]
        assert mask.shape == target.patches.shape[:2], f"mask {mask.shape}, patches {target.patches.shape}"

        with torch.no_grad():
            whole, every = self.teacher_head.embed(target.cls, target.patches.flatten(0, 1))  # [T*B, d], [T*B*N, d]
            patch_logits = self.teacher_head.patch_logits(every.index_select(0, rows))  # [n, K]
            patch_targets = self.patch_center.softmax(patch_logits, value_at(self.cfg.patch_temperature, now))

        crops = [tokens[need].cls for need in (self.masked, self.local) if need]
        hidden = masked.patches.flatten(0, 1).index_select(0, rows)  # [n, D]
        embedded, embedded_hidden = self.head.embed(torch.cat(crops), hidden)  # [S*B, d], [n, d]

        each = soft_cross_entropy(patch_targets, self.head.patch_logits(embedded_hidden), self.cfg.student_temperature)
        share = mask.sum(1).clamp(min=1).to(each.dtype).reciprocal()  # [T*B]: each crop weighs the same
        patch_loss = (each * share[rows // mask.shape[1]]).sum() / len(mask)
        logs = {"patch_loss": patch_loss.detach(), "patch_entropy": entropy_share(patch_targets)}
        loss = self.cfg.lambda2 * patch_loss
        if self.cfg.lambda1:
            class_loss, class_logs = self._class_term(whole, embedded, now)
            loss = loss + self.cfg.lambda1 * class_loss
            logs |= class_logs
        mean_logit = self.teacher_head.patch_logits(every.mean(0, keepdim=True)).squeeze(0)  # [K], of all patches
        self.patch_center.update(mean_logit * len(every), len(every))
        return {"loss": loss, **logs}

    def _class_term(self, target: Tensor, embedded: Tensor, now: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """DINO's loss on embeddings: the teacher's [T*B, d], the student's [S*B, d]."""
        with torch.no_grad():
            target_logits = self.teacher_head.class_logits(target)  # [T*B, K]
            targets = self.center.softmax(target_logits, value_at(self.cfg.teacher_temperature, now))
        loss = across_views(
            targets.unflatten(0, (self.teachers, -1)),  # [T, B, K]
            self.head.class_logits(embedded).unflatten(0, (self.views, -1)),  # [S, B, K]
            self.cfg.student_temperature,
        )
        self.center.update(target_logits.sum(0), len(target_logits))
        return loss, {"class_loss": loss.detach(), **target_metrics(loss, targets)}

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_head, self.head),)

    def param_rules(self) -> Iterable[ParamRule]:
        return (ParamRule(tuple(self.head.last_layers()), hold=self.cfg.hold_last_layer),)


class IBOTHead(nn.Module):
    """DINO's head; patches go through the same MLP, and through prototypes of their own if they have some."""

    def __init__(self, cfg: IBOTSettings, dim: int, patch_prototypes: int | None) -> None:
        super().__init__()
        self.dino = DinoHead(dim, cfg.out_dim, cfg.hidden, cfg.bottleneck, cfg.norm_last_layer)
        self.patch: Prototypes | None = None
        if patch_prototypes is not None:
            self.patch = Prototypes(cfg.bottleneck, patch_prototypes, not cfg.norm_last_layer)

    def embed(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one pass of the MLP; [C, D], [P, D] -> [C, d], [P, d]."""
        classes, rest = self.dino.embed(torch.cat((cls, patches))).split((len(cls), len(patches)))
        return classes, rest

    def class_logits(self, embedded: Tensor) -> Tensor:
        return self.dino.prototypes(embedded)

    def patch_logits(self, embedded: Tensor) -> Tensor:
        return (self.patch or self.dino.prototypes)(embedded)

    def last_layers(self) -> Iterable[nn.Parameter]:
        yield from self.dino.prototypes.parameters()
        if self.patch is not None:
            yield from self.patch.parameters()
