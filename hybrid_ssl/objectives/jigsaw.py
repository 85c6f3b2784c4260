"""Jigsaw on tokens: patches come as a set, without positions, and each one tells where it belongs.

Sources: the puzzle is Noroozi, Favaro, arXiv 1603.09246; on tokens it is MP3 (Zhai et al., arXiv 2207.07611) and
Jigsaw-ViT (Chen et al., arXiv 2207.11971), both from memory of the papers. No code of theirs was used.

    loss = mean over visible patches of cross-entropy(head(patch), its index in 0 .. N-1)

Without positions a ViT is permutation-equivariant: shuffling the patches would shuffle its outputs and change nothing
else, so nothing is shuffled, and there is no order that could leak. (A shuffled mosaic seen through positions is
another and worse task: the positions then contradict the picture.) The class token sees the set; it is trained through
the attention to it. `mask` drops patches, which makes the puzzle harder and cheaper. Guessing costs ln(N).

Needs an encoder whose positions are added to the patches: Swin's windows and rotary angles are the positions. Learned
positions get no gradient from this pass: use `encoder.position: sincos`, or another objective beside this one.
Differs from 1603.09246: no gaps between the tiles and no permutation classes; low-level cues of touching borders remain
(`mask` breaks most of them). Shapes: B images (V * B with several crops), N patches, n visible ones, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.cross_entropy import hard_cross_entropy
from ..nn.heads import Mlp
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens, visible_rows
from .base import Objective, ObjectiveSettings


class JigsawSettings(ObjectiveSettings):
    """Defaults: Jigsaw-ViT's for ImageNet, with its head of three layers."""

    view: str = "plain"
    mask: str | None = "random"
    """a mask whose hidden patches are dropped (Jigsaw-ViT: random, 0.5; MP3: 0.75); null: all patches are shown"""
    hidden: int | None = Field(None, ge=1)
    """width of the head's two hidden layers; null: the encoder's"""


class Jigsaw(Objective):
    """Predict the position of every visible patch."""

    Config = JigsawSettings
    compares_views = False

    def __init__(self, cfg: JigsawSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        if encoder.family != "vit":
            raise ValueError(
                f"jigsaw takes the positions away from the patches, which a {encoder.family} encoder cannot do without "
                "(a Swin's windows are positions); use a timm VisionTransformer"
            )
        self.cfg = cfg
        self.pieces = Forward("student", cfg.view, cfg.mask, drop=cfg.mask is not None, positions=False)
        self.needs = (self.pieces,)
        self.places = encoder.tokens(cfg.view)
        hidden = cfg.hidden or encoder.dim
        widths = (encoder.dim, hidden, hidden, self.places)
        self.head = Mlp(widths, norm=False, last_norm="none", bias=True, last_bias=True, activation=nn.ReLU)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`: mean over visible patches; `accuracy`: share of patches that find their exact place."""
        patches = tokens[self.pieces].patches  # [B, n, D]
        rows, shown = patches.shape[:2]
        if self.cfg.mask is None:
            places = torch.arange(shown, device=patches.device).expand(rows, -1)
        else:
            places = visible_rows(batch.masks[self.cfg.mask], shown)  # [B, n]
        loss, accuracy = hard_cross_entropy(self.head(patches.flatten(0, 1)), places.flatten())
        return {"loss": loss, "accuracy": accuracy}
