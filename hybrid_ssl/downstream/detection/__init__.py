"""Detection and instance segmentation: torchvision's detectors on a timm encoder, COCO's data format and measure."""

from .settings import DetectionRecipe
from .task import DetectionTask, restore

__all__ = ["DetectionRecipe", "DetectionTask", "restore"]
