"""Rotation: tell by how many quarter turns a picture was turned.

Source: Gidaris, Singh, Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", arXiv
1803.07728. Written from the paper and a fact sheet; tested against an independent computation.

    loss = cross-entropy(linear(pooled feature of crop k), k),   crop k = one square turned by k x 90 degrees, k < V

All turns of an image are in the same batch. The turns are exact transpositions (`turns: true` of the view), because an
interpolated one leaves traces that the net reads instead of the content; the square is cut before it is turned, and
never flipped upside down. Guessing costs ln(V). The task says nothing about pictures without an upright direction
(aerial images, textures), and the last layers specialise in it: probe intermediate ones, too.
Shapes: B images, V turns (4), D width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..nn.cross_entropy import hard_cross_entropy
from ..nn.precision import for_weight
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of, number_crops


class RotationSettings(ObjectiveSettings):
    """The head is one linear layer and has no settings."""

    view: str = "turned"
    """a view with `turns: true` and as many crops as turns (paper: 4)"""


class Rotation(Objective):
    """Classify quarter turns."""

    Config = RotationSettings

    def __init__(self, cfg: RotationSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.crops = crops_of(encoder, cfg.view)
        encoder.require(cfg.view, "turns", "true")
        if not 2 <= self.crops <= 4:
            raise ValueError(f"rotation tells 2 to 4 turns apart, view {cfg.view!r} has {self.crops} crops: set 4")
        self.turned = Forward("student", cfg.view)
        self.needs = (self.turned,)
        self.head = nn.Linear(encoder.dim, self.crops)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: mean over all turns of all images; `accuracy`: share of turns that are recognised."""
        pooled = tokens[self.turned].cls  # [V*B, D]
        loss, accuracy = hard_cross_entropy(
            self.head(for_weight(pooled, self.head.weight)), number_crops(pooled, self.crops)
        )
        return {"loss": loss, "accuracy": accuracy}
