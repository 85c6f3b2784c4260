"""Gram anchoring: patches stay as alike to each other as an earlier teacher saw them.

Source: Simeoni et al., "DINOv3", arXiv 2508.10104. Written from the paper and a fact sheet; tested against an
independent computation. In long training class-token losses wear out dense features. This objective, beside them (e.g.
`dinov2`), compares with a frozen encoder which patches of an image resemble which:

    loss = mean over images and pairs of patches (i, j) of (cos(s_i, s_j) - cos(g_i, g_j))^2

s are the student's patches, of the same pass as the other objectives' (masked or not), g those of the frozen encoder
`encoder`. It best looks at a larger picture of the same crop (`frozen_view`, made `like` the student's view), whose
features are resized to the student's grid. Published: the teacher of an earlier step, taken anew every 10,000 steps at
most three times; weight 0 before, then 2 (section `frozen` and `weight`; see `recipes/gram_vitl.yaml`).

Only cosines meet, so the frozen encoder may have another width or be another model. Cosines below zero stay as they
are. Shapes: V crops, B images, N patches, D width of the student, E width of the frozen encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..nn.gram import gram_loss, resize_patches
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of


class GramSettings(ObjectiveSettings):
    """Defaults: beside `dinov2`, with a larger view for the frozen encoder."""

    view: str = "global"
    """crops of the student"""
    mask: str | None = "block"
    """the mask of the student's pass (DINOv3: the masked pass, at no extra cost); null: a pass of whole crops"""
    encoder: str = "gram"
    """a frozen encoder of the recipe"""
    frozen_view: str = "gram"
    """what the frozen encoder looks at: a view made `like` the student's, or the student's own"""


class Gram(Objective):
    """Patch similarities held at those of a frozen encoder."""

    Config = GramSettings
    compares_views = False

    def __init__(self, cfg: GramSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        frozen = encoder.of(cfg.encoder)
        if crops_of(encoder, cfg.view) != crops_of(encoder, cfg.frozen_view):
            raise ValueError(
                f"view {cfg.frozen_view!r} has {encoder.crops[cfg.frozen_view]} crops, {cfg.view!r} has "
                f"{encoder.crops[cfg.view]}: set views.{cfg.frozen_view}.like={cfg.view} and as many crops"
            )
        self.student = Forward("student", cfg.view, cfg.mask)
        self.target = Forward(cfg.encoder, cfg.frozen_view)
        self.needs = (self.student, self.target)
        self.grid, self.frozen_grid = encoder.grids[cfg.view], frozen.grids[cfg.frozen_view]

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        seen = tokens[self.target].patches  # [V*B, N', E]
        target = resize_patches(seen, self.frozen_grid, self.grid)  # [V*B, N, E]
        return {"loss": gram_loss(tokens[self.student].patches, target)}
