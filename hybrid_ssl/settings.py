"""The strict base of every configuration class: unknown keys, wrong types and non-finite numbers are refused.

Sections stand beside the code that they configure. The encoder's is the exception: beside its code, every error in a
recipe would first wait for timm's import, which takes longer than all others together.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all recipe sections.

    Each class that is configured from a recipe owns a `Settings` subclass that stands beside it, with every
    default visible. Instances are frozen: a resolved recipe never changes while a run lasts.
    """

    model_config = ConfigDict(
        extra="forbid",  # a typo is an error, never ignored
        frozen=True,
        strict=True,  # "0.1" is no number, 1 is no bool
        validate_default=True,
        allow_inf_nan=False,  # lr: .nan would train to a NaN encoder
        populate_by_name=True,
    )


class EncoderSettings(Settings):
    """The timm model that is trained."""

    name: str
    """any timm model name, e.g. `vit_base_patch16_224` or `swin_tiny_patch4_window7_224`"""
    init: str | None = None
    """null: random weights; `timm`: timm's default weights for `name`; a timm name with tag; `hf-hub:user/name`; the
    folder of an earlier run or export; or an official checkpoint file, see docs/weights.md"""
    init_part: str | None = None
    """which encoder of a checkpoint file that holds several, e.g. `student`; null: the one its authors publish"""
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
