"""timm models as encoders that return `Tokens`: the only file that knows timm's insides.

Models come from `timm.create_model` and are never rewritten; their own parts are called one after the other, so that
patches can be hidden in between. An unmasked pass equals timm's `forward_features`. ViT (also with rotary positions):
hidden patches are dropped before they are embedded, or replaced by a mask token. Swin: replaced after the patch
embedding, each 32-pixel unit as a whole. Other families give pooled features only.
Shapes: R = V*B crops, N patches, D width.
"""

from __future__ import annotations

from ..settings import EncoderSettings
from .base import Encoder, StochasticDepth
from .build import build_encoder, load_frozen, wrap
from .swin import SwinEncoder
from .vit import VitEncoder

__all__ = [
    "Encoder",
    "EncoderSettings",
    "StochasticDepth",
    "SwinEncoder",
    "VitEncoder",
    "build_encoder",
    "load_frozen",
    "wrap",
]
