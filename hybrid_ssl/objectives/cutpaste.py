"""CutPaste: tell a picture from the same picture with a planted defect, to learn what is normal.

Source: Li, Sohn, Yoon, Pfister, "CutPaste: Self-Supervised Learning for Anomaly Detection and Localization", arXiv
2104.04015; the head's widths after a public re-implementation's description. No code was used.

    loss = cross-entropy(head(pooled feature of crop k), k),   crop k = the crop with the k-th of `views.*.cutpaste`

All versions of a picture are in the same batch: [none, patch] and [none, scar] are the paper's binary tasks, [none,
patch, scar] its 3-way task, which it found best. One model is trained for one kind of object. The head is thrown away:
`hybrid-ssl anomaly` fits a Gaussian to the encoder's features of good pictures and scores others by their distance.
Guessing costs ln(V). Shapes: B images, V versions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from ..nn.cross_entropy import hard_cross_entropy
from ..nn.heads import Mlp
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of, number_crops


class CutPasteSettings(ObjectiveSettings):
    """Defaults: the paper's, whose encoder is 512 wide."""

    view: str = "pasted"
    """a view whose `cutpaste` names the defect of each crop"""
    hidden: int | None = Field(None, ge=1)
    """width of the head's first hidden layer; null: the encoder's"""
    bottleneck: int = Field(128, ge=1)
    """width of its second one"""


class CutPaste(Objective):
    """Classify planted defects."""

    Config = CutPasteSettings

    def __init__(self, cfg: CutPasteSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.crops = crops_of(encoder, cfg.view)
        encoder.require(cfg.view, "cutpaste", "[none,patch,scar]")
        if self.crops < 2:
            raise ValueError(
                f"cutpaste tells versions of a picture apart, but view {cfg.view!r} has one crop: set 2 or 3"
            )
        self.pasted = Forward("student", cfg.view)
        self.needs = (self.pasted,)
        widths = (encoder.dim, cfg.hidden or encoder.dim, cfg.bottleneck, self.crops)
        self.head = Mlp(widths, last_norm="none", last_bias=True)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: mean over all versions of all images; `accuracy`: share of versions that are recognised."""
        pooled = tokens[self.pasted].cls  # [V*B, D]
        loss, accuracy = hard_cross_entropy(self.head(pooled), number_crops(pooled, self.crops))
        return {"loss": loss, "accuracy": accuracy}
