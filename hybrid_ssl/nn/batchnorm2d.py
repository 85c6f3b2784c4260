"""BatchNorm of maps over all processes, on any device, with running statistics for use after training.

torch's `SyncBatchNorm` refuses a CPU. In training this one gathers every process's mean, variance and count (with
gradients) and combines them with Chan's formula; in eval, and with one process, it is torch's. State-dict keys are
those of `nn.BatchNorm2d`. Shapes: B images on this process, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import gather, world_size
from .precision import full_precision, no_autocast


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch is that of all processes; the result is float32 (or float64) in training.

    Raises:
        ValueError: a channel has a single value, whose variance is zero.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        count = world_size() * x.numel() // x.shape[1]
        if count < 2:
            raise ValueError("BatchNorm over a single value gives zeros: use a larger batch, or norm: group")
        with no_autocast(x):
            x = full_precision(x)
            return super().forward(x) if world_size() == 1 else self._normalise_globally(x)

    def _normalise_globally(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)  # [C]
        size = torch.full_like(mean, x.numel() / x.shape[1])
        means, variances, counts = gather(torch.stack((mean, var, size)).unsqueeze(0)).unbind(1)  # each [W, C]
        share = counts / counts.sum(0)
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        self._remember(mean.detach(), var.detach(), counts.sum(0).detach())
        scale = (var + self.eps).rsqrt() * self.weight
        return torch.addcmul((self.bias - mean * scale).view(-1, 1, 1), x, scale.view(-1, 1, 1))

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = var * count / (count - 1)  # torch keeps the unbiased one
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
