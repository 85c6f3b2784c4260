"""MSN: a crop with patches taken away gets the same soft cluster as the whole one; no patch is ever predicted.

Source: Assran et al., "Masked Siamese Networks for Label-Efficient Learning", arXiv 2204.07141. Written from the paper
and a fact sheet; tested against an independent computation.

    p      = softmax(unit(head(z)) . unit(q) / tau) over learnable prototypes q, for every anchor
    target = the same of the teacher's features of one other, whole crop; sharpened, p^(1/T) / sum, then balanced by
             Sinkhorn on these probabilities, in this order
    loss   = mean over anchors of cross-entropy(target, p) + memax_weight * (ln K - entropy of the mean p)

Anchors are a large crop with dropped patches and small "focal" crops, whole. The mean p of the second term is that of
all anchors on all processes, with its exact gradient: 64 anchors cannot use 1,024 prototypes evenly by themselves.
Prototypes are one set for student and teacher and take the student's gradient only.

Known differences: patches are dropped for each image by itself (released: the same for the whole batch); BatchNorm in
the heads runs over the global batch; prototypes get the mean gradient of all processes as every parameter does
(released: the sum). On Swin, which cannot drop patches, set `mask: null`. The teacher moves after the step.
Shapes: B images, A anchors an image, D encoder width, d head width, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.contrast import unit
from ..nn.cross_entropy import entropy_share, soft_cross_entropy
from ..nn.distributed import all_sum, world_size
from ..nn.heads import Mlp
from ..nn.precision import full_precision, no_autocast
from ..nn.prototypes import Prototypes
from ..nn.sinkhorn import sinkhorn
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, ParamRule, crops_of


class MSNSettings(ObjectiveSettings):
    """Defaults: the released ViT-S run's."""

    target_view: str = "target"
    """one crop, which the teacher sees whole"""
    view: str = "anchor"
    """large crops of the student (paper: 1)"""
    focal_view: str | None = "focal"
    """small crops of the student, always whole (paper: 10); null: none"""
    mask: str | None = "dropped"
    """which patches of `view` are removed, a mask of kind random; null: none"""
    out_dim: int = Field(1024, ge=2)
    """K, the number of prototypes"""
    hidden: int = Field(2048, ge=1)
    dim: int = Field(256, ge=1)
    """d, the width in which prototypes live"""
    temperature: float = Field(0.1, gt=0)
    sharpening: float = Field(0.25, gt=0, le=1)
    """T of the targets; 1 leaves them as they are"""
    sinkhorn_iterations: int = Field(3, ge=0)
    """0: targets are only sharpened"""
    memax_weight: float = Field(1.0, ge=0)
    """factor of the term that keeps all prototypes in use"""


class MSN(Objective):
    """Soft clusters of masked crops match those of whole ones."""

    Config = MSNSettings

    def __init__(self, cfg: MSNSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        if crops_of(encoder, cfg.target_view) != 1:
            raise ValueError(
                f"msn has one target an image, but view {cfg.target_view!r} has {encoder.crops[cfg.target_view]} "
                f"crops: set views.{cfg.target_view}.crops to 1"
            )
        self.cfg = cfg
        self.anchor = Forward("student", cfg.view, cfg.mask, drop=cfg.mask is not None)
        self.focal = None if cfg.focal_view is None else Forward("student", cfg.focal_view)
        self.target = Forward("teacher", cfg.target_view)
        self.needs = tuple(need for need in (self.anchor, self.focal, self.target) if need)
        self.head = Mlp(
            (encoder.dim, cfg.hidden, cfg.hidden, cfg.dim),
            last_norm="none",
            bias=True,
            last_bias=True,
            activation=nn.GELU,
        )
        self.teacher_head = deepcopy(self.head).requires_grad_(False)
        self.prototypes = Prototypes(cfg.dim, cfg.out_dim)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`, its terms `match` and `memax`, and entropies over ln K: `teacher_entropy` of a target,
        `teacher_spread` of the mean target (both 1: uniform collapse; both 0: one prototype wins)."""
        cfg = self.cfg
        with torch.no_grad():
            seen = self.prototypes(unit(self.teacher_head(tokens[self.target].cls)))  # [B, K]
            targets = sharpened_targets(seen, cfg.temperature, cfg.sharpening, cfg.sinkhorn_iterations)
        crops = [tokens[need].cls for need in (self.anchor, self.focal) if need]
        logits = self.prototypes(unit(self.head(torch.cat(crops))))  # [A*B, K]

        anchors = logits.unflatten(0, (-1, len(targets)))  # [A, B, K]
        match = soft_cross_entropy(targets.expand_as(anchors), anchors, cfg.temperature).mean()
        memax = unused_prototypes(logits, cfg.temperature)
        return {
            "loss": match + cfg.memax_weight * memax,
            "match": match.detach(),
            "memax": memax.detach(),
            "teacher_entropy": entropy_share(targets),
            "teacher_spread": entropy_share(targets.mean(0)),
        }

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_head, self.head),)

    def param_rules(self) -> Iterable[ParamRule]:
        return (ParamRule(tuple(self.prototypes.parameters()), weight_decay=0.0),)


@torch.no_grad()
def sharpened_targets(logits: Tensor, temperature: float, sharpening: float, iterations: int) -> Tensor:
    """Probabilities, sharpened, then balanced; [R, K] cosines -> [R, K] float32 rows that sum to 1.

    Args:
        temperature: of the softmax.
        sharpening: T; p^(1/T) / sum is the softmax at temperature * T.
        iterations: of Sinkhorn, which sees the probabilities of all processes; 0: none.
    """
    with no_autocast(logits):
        log_p = (full_precision(logits) / (temperature * sharpening)).log_softmax(dim=-1)
        return sinkhorn(log_p, 1.0, iterations) if iterations else log_p.exp()


def unused_prototypes(logits: Tensor, temperature: float) -> Tensor:
    """ln K - entropy of the mean probabilities of all processes' rows (equally many each); [R, K] -> scalar.

    0 if all prototypes are used alike, ln K if one takes all.
    """
    with no_autocast(logits):
        own = (full_precision(logits) / temperature).softmax(dim=-1).mean(0)  # [K]
        mean = all_sum(own) / world_size()
        return math.log(len(mean)) - torch.special.entr(mean).sum()
