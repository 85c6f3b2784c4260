"""BatchNorm over the global batch, on any device, for the heads of self-supervised methods.

torch's `SyncBatchNorm` refuses a CPU. This one gathers every process's mean, variance and count (one collective each
way) and combines them with Chan's formula, so it also loses no digits where the mean is large. It keeps no running
statistics: heads are used in training only, and their teachers normalise with their own batch too (MoCo v3, BYOL).

Shapes: B rows on this process (W processes may have different B), C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import gather, world_size
from .precision import full_precision, no_autocast


class SyncBatchNorm1d(nn.Module):
    """Normalise [B, C] with mean and biased variance of all processes' rows; the result is float32 (or float64).

    Args:
        dim: C.
        affine: learn a scale, and a shift as well unless `shift` is false (SimCLR's last layer has a scale alone).
        shift: learn a shift when `affine`.
        eps: added to the variance.

    Raises:
        ValueError: the global batch is a single row, whose variance is zero.
    """

    def __init__(self, dim: int, affine: bool = True, shift: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and shift else None

    def forward(self, x: Tensor) -> Tensor:
        with no_autocast(x):
            x = full_precision(x)
            if world_size() > 1:
                return self._normalise_globally(x)
            if x.shape[0] < 2:
                raise ValueError("BatchNorm over a global batch of 1 gives zeros: use a larger run.batch_size")
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _normalise_globally(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=0, correction=0)  # [C]
        stats = gather(torch.stack((mean, var, torch.full_like(mean, x.shape[0]))).unsqueeze(0))  # [W, 3, C]
        means, variances, counts = stats.unbind(1)
        share = counts / counts.sum(0)
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift, x, scale)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"
