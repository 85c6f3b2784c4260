"""Semantic segmentation: a class for every pixel, with a linear head or UPerNet on any timm ViT or Swin."""

from __future__ import annotations

from .model import restore
from .settings import SegmentationRecipe
from .task import SegmentationTask

__all__ = ["SegmentationRecipe", "SegmentationTask", "restore"]
