"""Mean intersection over union and accuracies, from one confusion matrix that is summed exactly over processes.

Integers: float32 counts stop growing at 2^24 pixels, which 64 images of 512 x 512 reach. A class that is neither in the
truth nor predicted has no IoU and is left out of the mean (as in mmsegmentation); one that is predicted but not there
counts as 0. Shapes: K classes, n pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...nn.distributed import all_sum_no_grad

IGNORED = -1
"""target of pixels that are neither trained nor measured"""


class Confusion:
    """Counts of (true class, predicted class): int64 [K, K], ignored pixels left out."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count pixels: two integer tensors of one shape."""
        truth, predicted = truth.flatten().long(), predicted.flatten().long()
        known = truth != IGNORED
        pairs = truth[known] * self.classes + predicted[known]
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def total(self) -> Tensor:
        """Of all processes, on the CPU."""
        return all_sum_no_grad(self.counts).cpu()


def measures(counts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """What a confusion matrix [K, K] says, as shares of 1.

    Returns:
        `mIoU`, `pixel_accuracy`, `mean_accuracy` (over the classes in the truth), `classes_measured`, and `IoU/NAME`
        for each class that is there or was predicted.
    """
    hits, truth, predicted = (part.double() for part in (counts.diagonal(), counts.sum(1), counts.sum(0)))
    union = truth + predicted - hits
    seen, there = union > 0, truth > 0
    iou = hits / union.clamp(min=1)
    accuracy = hits / truth.clamp(min=1)
    out = {
        "mIoU": float(iou[seen].mean()) if seen.any() else 0.0,
        "pixel_accuracy": float(hits.sum() / truth.sum().clamp(min=1)),
        "mean_accuracy": float(accuracy[there].mean()) if there.any() else 0.0,
        "classes_measured": float(seen.sum()),
    }
    return out | {f"IoU/{name}": float(iou[k]) for k, name in enumerate(names) if seen[k]}
