"""MoCo v2: MoCo v1 with a two-layer head, a higher temperature, stronger augmentation and a cosine schedule.

Source: Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297. Written from the paper
and a fact sheet. Loss, queue and teacher are MoCo v1's; what else is new stands in the recipe (blur, jitter, schedule).

Swin: yes. Shapes: D encoder width, d head width.
"""

from __future__ import annotations

from pydantic import Field

from ..nn.heads import Mlp
from .moco_v1 import MoCoV1, MoCoV1Settings


class MoCoV2Settings(MoCoV1Settings):
    """Defaults: the paper's."""

    temperature: float = Field(0.2, gt=0)
    hidden: int | None = Field(None, ge=1)
    """width of the head's hidden layer; null: the encoder's, as in the paper"""


class MoCoV2(MoCoV1):
    """MoCo with a two-layer head."""

    Config = MoCoV2Settings
    cfg: MoCoV2Settings

    def build_projector(self, width: int) -> Mlp:
        """Two linear layers with a ReLU in between; no BatchNorm."""
        dims = (width, self.cfg.hidden or width, self.cfg.dim)
        return Mlp(dims, norm=False, last_norm="none", bias=True, last_bias=True)
