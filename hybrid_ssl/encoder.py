from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .settings import Settings


class EncoderSettings(Settings):
    """The timm model that is trained."""

    name: str
    """any timm model name, e.g. `vit_base_patch16_224` or `swin_tiny_patch4_window7_224`"""
    init: str | None = None
    """null: random weights; `timm`: timm's default pretrained weights; else a folder that an earlier run exported"""
    args: dict[str, Any] = {}
    """more arguments of `timm.create_model`, e.g. {reg_tokens: 4, patch_size: 8}"""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """stochastic depth of the student, linearly growing over the blocks"""
    position: Literal["timm", "sincos"] = "timm"
    """`sincos`: fixed 2-D sine-cosine positions instead of learned ones (MAE, MoCo v3)"""
    scheme: Literal["timm", "mae", "moco"] = "timm"
    """initialisation of random weights: `mae`: Xavier, fused qkv as one matrix; `moco`: Xavier, q, k, v as three"""
    freeze_patch_embed: bool = False
    """keep the patch embedding at its initial value (MoCo v3)"""
