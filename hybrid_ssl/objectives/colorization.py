"""Colorization: from a gray picture, tell the colours it had.

Source: Zhang, Isola, Efros, "Colorful Image Colorization", arXiv 1603.08511. Written from the paper and a fact sheet.

    loss = mean over cells of w(z) * cross-entropy(z, head(patch)),   z = the 5 nearest of Q bins on Lab's ab plane
    w(z) = w of the nearest bin,  w ~ 1 / ((1 - l) p + l / Q),  sum_q p_q w_q = 1,  l = 0.5

A patch token predicts cells x cells colours, the mean ab of the pixels of each cell (paper: a quarter of the picture's
resolution, which is 4 x 4 cells of a 16-pixel patch). Classes let the answer be uncertain, where a regression would say
gray; the weights keep rare, saturated colours from being drowned by the gray of most pixels. The paper measured p on
ImageNet; here it is a running share of the colours seen by all processes, smoothed like the targets. `kind: regression`
is the simpler form, smooth L1 on ab / 110.

The encoder sees the picture as gray in all three channels (`gray: 1.0`), so its statistics shift when it is fine-tuned
on colours. The colour view must not be jittered: its colours are the answer. Guessing costs ln(Q).

Shapes: R = V*B crops, N patches, D width, c cells of a patch's side, Q bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..nn.distributed import all_sum_no_grad
from ..nn.lab import ab_bins, soft_bins, srgb_to_lab
from ..nn.precision import for_weight, full_precision, no_autocast
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, crops_of

_SCALE = 110.0  # brings a and b to about -1 .. 1


class ColorizationSettings(ObjectiveSettings):
    """Defaults: the paper's."""

    view: str = "gray"
    """what the encoder sees: a view with `gray: 1.0`, `like` the colour view"""
    color_view: str = "color"
    """the same crops in colour, without jitter"""
    kind: Literal["classes", "regression"] = "classes"
    cells: int = Field(4, ge=1)
    """c: a patch is cut into c x c cells of one colour each; divides the encoder's stride"""
    rebalance: float = Field(0.5, gt=0, le=1)
    """l: the smaller, the more a rare colour weighs; 1: all weigh alike"""
    prior_momentum: float = Field(0.99, ge=0, lt=1)
    """share of the old p that an update keeps"""


class Colorization(Objective):
    """Predict the colour of gray patches."""

    Config = ColorizationSettings
    compares_views = False
    mean: Tensor
    std: Tensor
    bins: Tensor
    prior: Tensor

    def __init__(self, cfg: ColorizationSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        self.cfg = cfg
        _check(cfg, encoder)
        self.gray = Forward("student", cfg.view)
        self.needs, self.reads = (self.gray,), (cfg.color_view,)
        self.grid, self.cell = encoder.grids[cfg.view], encoder.stride // cfg.cells
        mean, std = encoder.mean or (0.0,) * 3, encoder.std or (1.0,) * 3
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        outputs = 2
        if cfg.kind == "classes":
            self.register_buffer("bins", ab_bins(), persistent=False)
            outputs = len(self.bins)
            self.register_buffer("prior", torch.full((outputs,), 1 / outputs))
        self.head = nn.Linear(encoder.dim, cfg.cells**2 * outputs)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; of classes also `accuracy`, the share of cells whose nearest bin is predicted; of a regression
        `baseline`, the loss of predicting gray."""
        colours = self.colours(batch.views[self.cfg.color_view])  # [cells, 2]
        patches = tokens[self.gray].patches
        predicted = self.head(for_weight(patches, self.head.weight))  # [R, N, c*c*Q]
        predicted = full_precision(predicted).reshape(len(colours), -1)  # [cells, Q]
        with no_autocast(predicted):
            if self.cfg.kind == "regression":
                return {
                    "loss": F.smooth_l1_loss(predicted, colours / _SCALE),
                    "baseline": F.smooth_l1_loss(torch.zeros_like(colours), colours / _SCALE),
                }
            near, shares = soft_bins(colours, self.bins)  # [cells, 5] each
            weight = rebalanced(self.prior, self.bins, self.cfg.rebalance)[near[:, 0]]
            each = predicted.logsumexp(1) - (predicted.gather(1, near) * shares).sum(1)
            loss = (weight * each).mean()
        self._count(near[:, 0])
        return {"loss": loss, "accuracy": (predicted.argmax(1) == near[:, 0]).to(loss.dtype).mean()}

    @torch.no_grad()
    def colours(self, images: Tensor) -> Tensor:
        """Mean a and b of every cell: normalised [R, 3, H, W] -> [R*N*c*c, 2], patch by patch, rows first."""
        ab = srgb_to_lab(full_precision(images) * self.std + self.mean)[:, 1:]
        ab = F.avg_pool2d(ab, self.cell)  # [R, 2, rows*c, columns*c]
        c = self.cfg.cells
        ab = ab.unflatten(2, (self.grid[0], c)).unflatten(4, (self.grid[1], c))  # [R, 2, rows, c, columns, c]
        return ab.permute(0, 2, 4, 3, 5, 1).reshape(-1, 2)

    @torch.no_grad()
    def _count(self, nearest: Tensor) -> None:
        """Move the prior towards the share of each bin in the global batch."""
        ones = self.prior.new_ones(len(nearest))
        counts = all_sum_no_grad(torch.zeros_like(self.prior).index_add_(0, nearest, ones))  # bincount would sync
        self.prior.lerp_(counts / counts.sum(), 1 - self.cfg.prior_momentum)


def rebalanced(prior: Tensor, bins: Tensor, share: float, sigma: float = 5.0) -> Tensor:
    """Weights of the bins, equation 4 of the paper: [Q] that sum to 1, [Q, 2] -> [Q] whose mean under the prior is 1.

    Args:
        share: l, of the uniform distribution in the mixture.
        sigma: of the Gaussian that smooths the prior, in units of a and b.
    """
    kernel = (-torch.cdist(bins, bins).square() / (2 * sigma**2)).softmax(dim=1)  # each bin spreads a mass of 1
    smooth = prior @ kernel
    weight = 1 / ((1 - share) * smooth + share / len(prior))
    return weight / (smooth * weight).sum()


def _check(cfg: ColorizationSettings, encoder: EncoderSpec) -> None:
    if encoder.in_chans != 3:
        raise ValueError(f"colorization needs colours: set data.channels=3, which is {encoder.in_chans}")
    if encoder.family == "pooled":
        raise ValueError("colorization predicts the colours of patches: use a timm ViT or Swin")
    if encoder.stride % cfg.cells:
        raise ValueError(f"{cfg.cells} cells do not divide a patch of {encoder.stride} pixels: set cells to a divisor")
    crops_of(encoder, cfg.color_view)
    encoder.require(cfg.view, "gray", "1.0")
    encoder.require(cfg.view, f"like={cfg.color_view}")
