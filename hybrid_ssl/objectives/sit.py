"""SiT: rebuild a picture with corrupted pixels, and recognise it among all others.

Source: Atito, Awais, Kittler, "SiT: Self-supervised vIsion Transformer", arXiv 2104.03602, in the later form of its
repository (group masked model learning and contrast; the first version predicted rotations, too). Written from a fact
sheet; the repository carries no licence and was not used.

    loss = L_c + w L_r
    L_c  = ctr(s1, t2) + ctr(s2, t1),  ctr(q, k) = 2 tau * cross-entropy(q k^T / tau, own key)
    L_r  = mean |rebuilt - clean| over the corrupted pixels of both crops, all processes counting together

The student sees the corrupted crops and every patch of them; the teacher the clean ones, class token only. Corruption
is the data room's (`views.*.corrupt`), pixel by pixel, so that parts of a patch can be left; what is corrupted comes as
a mask, because a pixel pasted from another image may have the right value by chance and counts all the same.

What exists already: L_c is MoCo v3's loss without its predictor. New are the corruption and the decoder of three layers
and one transposed convolution. A near relative without new code is simmim + moco_v3 on one masked pass.
Small data sets want w = 5.

Shapes: B images, V = 2 crops, N patches, D width, d head width, M images of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from pydantic import Field
from torch import Tensor, nn

from ..nn.contrast import info_nce, unit
from ..nn.distributed import all_sum_no_grad, gather_no_grad, world_size
from ..nn.heads import Mlp
from ..nn.precision import for_weight, full_precision
from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from .base import Objective, ObjectiveSettings, check_two_crops


class SiTSettings(ObjectiveSettings):
    """Defaults: the repository's for ViT-S."""

    view: str = "corrupted"
    """what the student sees: a view of two crops with `corrupt`, `like` the clean one"""
    clean_view: str = "global"
    """what the teacher sees, and what is rebuilt"""
    hidden: int = Field(4096, ge=1)
    dim: int = Field(256, ge=1)
    """width of queries and keys"""
    temperature: float = Field(0.2, gt=0)
    reconstruction_weight: float = Field(1.0, ge=0)
    """w; 5 for small data sets"""


class SiT(Objective):
    """Rebuild corrupted pixels and contrast class tokens."""

    Config = SiTSettings

    def __init__(self, cfg: SiTSettings, encoder: EncoderSpec) -> None:
        super().__init__(cfg, encoder)
        for view in (cfg.view, cfg.clean_view):
            check_two_crops(encoder, view, "sit")
        encoder.require(cfg.view, "corrupt", "{}")
        encoder.require(cfg.view, f"like={cfg.clean_view}")
        if encoder.family == "pooled":
            raise ValueError("sit rebuilds pixels from patch tokens: use a timm ViT or Swin")
        self.cfg = cfg
        self.corrupted = Forward("student", cfg.view)
        self.clean = Forward("teacher", cfg.clean_view)
        self.needs = (self.corrupted, self.clean)
        self.grid = encoder.grids[cfg.view]
        self.head = Mlp((encoder.dim, cfg.hidden, cfg.hidden, cfg.dim))
        self.head[5] = nn.GELU()  # released: ReLU after the first layer, GELU after the second
        self.teacher_head = deepcopy(self.head).requires_grad_(False)
        self.decoder = PixelDecoder(encoder.dim, encoder.in_chans, encoder.stride)

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """`loss`; `contrast`: L_c; `pixels`: L_r, and its `baseline`, that of the corrupted picture itself."""
        seen = tokens[self.corrupted]
        with torch.no_grad():
            own = torch.stack(
                [unit(self.teacher_head(crop)) for crop in tokens[self.clean].cls.chunk(2)], 1
            )  # [B, 2, d]
            keys1, keys2 = gather_no_grad(own).unbind(1)  # [M, d] each
        query1, query2 = (unit(self.head(crop)) for crop in seen.cls.chunk(2))  # [B, d] each
        tau = self.cfg.temperature
        contrast = 2 * tau * (info_nce(query1, keys2, tau) + info_nce(query2, keys1, tau))

        clean = full_precision(batch.views[self.cfg.clean_view])  # [V*B, C, H, W]
        where = batch.masks[f"{self.cfg.view}.pixels"].view(len(clean), 1, *clean.shape[2:])
        rebuilt = full_precision(self.decoder(seen.patches, self.grid))
        pixels = corrupted_l1(rebuilt, clean, where)
        return {
            "loss": contrast + self.cfg.reconstruction_weight * pixels,
            "contrast": contrast.detach(),
            "pixels": pixels.detach(),
            "baseline": corrupted_l1(full_precision(batch.views[self.cfg.view]), clean, where),
        }

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        return ((self.teacher_head, self.head),)


class PixelDecoder(nn.Module):
    """Patch tokens to pixels: three linear layers with GELU, then a transposed convolution of one patch."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.ConvTranspose2d(width, channels, patch, stride=patch)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[R, N, D] -> [R, C, H, W]."""
        x = for_weight(patches, self.out.weight)
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return self.out(x.transpose(1, 2).unflatten(2, grid))


def corrupted_l1(rebuilt: Tensor, clean: Tensor, where: Tensor) -> Tensor:
    """Mean distance over the corrupted values of all processes; twice [R, C, H, W], bool [R, 1, H, W] -> scalar.

    Each process returns its sum over 1/W of the global count, so that the average over processes is that mean.
    """
    values = all_sum_no_grad(where.sum()) * clean.shape[1] / world_size()
    return ((rebuilt - clean).abs() * where).sum() / values.clamp_min(1)
