"""Classification: fine-tuning an encoder for one label per image."""

from .model import restore
from .settings import ClassificationRecipe
from .task import ClassificationTask

__all__ = ["ClassificationRecipe", "ClassificationTask", "restore"]
