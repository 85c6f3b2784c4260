"""Encoders to be fine-tuned: the timm model itself with its weights, normalisation, and one adapter to dense maps.

timm's own modules stay as they are (keys, stochastic depth, layer groups). Dense tasks read `forward_intermediates`
with NCHW maps: one way for ViT (all maps of one stride) and Swin (strides 4, 8, 16, 32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..encoder.base import mean_std
from ..hub.from_run import recipe_of
from ..hub.load import load_encoder
from .settings import FinetuneEncoder


@dataclass(frozen=True)
class Opened:
    """An encoder that was opened.

    Attributes:
        model: timm's, without classifier.
        mean, std: per channel in 0..1, what its weights expect.
        again: {"architecture", "args"} for timm to build it again, as JSON; weights are stored apart.
    """

    model: nn.Module
    mean: list[float]
    std: list[float]
    again: dict[str, Any]


def open_encoder(
    cfg: FinetuneEncoder, *, size: int | Sequence[int], seed: int, dynamic: bool = False, **args: Any
) -> Opened:
    """Open the encoder of a fine-tuning recipe.

    Args:
        size: pixels that the task feeds; `cfg.size` goes before it.
        seed: of random weights (`cfg.random`) and of new heads in `args` (num_classes).
        dynamic: images of any size come: positions are resampled, sides padded to whole patches and windows.
        args: more of timm's, e.g. num_classes.

    Raises:
        ValueError: there is no such encoder, or it does not fit.
    """
    if not cfg.name:
        raise ValueError("encoder.name is empty: give the encoder on the command line, a folder or a timm model name")
    chosen = size if cfg.size is None else cfg.size
    height, width = (chosen, chosen) if isinstance(chosen, int) else (chosen[0], chosen[-1])
    args["drop_path_rate"] = cfg.drop_path  # also 0: timm's Swin has a rate of its own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_encoder(cfg.name, size=(height, width), pretrained=not cfg.random, dynamic=dynamic, **args)
    if dynamic:  # dense tasks read maps: what only pools them would get no gradient
        for name in ("fc_norm", "attn_pool", "head"):
            part = getattr(model, name, None)  # timm sets attn_pool to None where there is none
            if part is not None:
                part.requires_grad_(False)
    if cfg.frozen:
        model.requires_grad_(False)
    mean, std = mean_std(model)
    return Opened(model, mean, std, recipe_of(model))


def rebuild(again: dict[str, Any]) -> nn.Module:
    """The timm model of `Opened.again`, with random weights."""
    model: nn.Module = timm.create_model(again["architecture"], **{"num_classes": 0} | again["args"])
    return model


class Normalise(nn.Module):
    """uint8 [B, C, H, W] -> float, normalised; mean and std per channel in 0..1 are stored with the model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std


@dataclass(frozen=True)
class Taps:
    """Where dense tasks read an encoder: four depths from shallow to deep.

    Attributes:
        indices: of `forward_intermediates`.
        channels: of each map.
        strides: pixels of one token's side in each map; all the same for a ViT, doubling for a Swin.
    """

    indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]


def taps_of(encoder: Any) -> Taps:
    """A ViT is read after each quarter of its blocks (BEiT and MAE: after 4, 6, 8, 12 of 12), a Swin after each stage.

    Raises:
        ValueError: the model gives no intermediate maps.
    """
    info = getattr(encoder, "feature_info", None)
    if not info or not hasattr(encoder, "forward_intermediates"):
        raise ValueError(f"{type(encoder).__name__} gives no maps for dense tasks: use a timm ViT or Swin")
    count = len(info)
    if len({stage["reduction"] for stage in info}) == 1:
        indices = tuple(max(0, round(count * quarter / 4) - 1) for quarter in (1, 2, 3, 4))
    else:
        indices = tuple(range(count))
    return Taps(indices, tuple(info[i]["num_chs"] for i in indices), tuple(int(info[i]["reduction"]) for i in indices))


def stage_norms(taps: Taps) -> nn.ModuleList:
    """A LayerNorm for each of a Swin's maps, as in its official detection and segmentation; the last one has the
    encoder's own already. Maps of inner stages are sums of residuals of any size: unnormed they drown a new head."""
    return nn.ModuleList([*(LayerNorm2d(channels) for channels in taps.channels[:-1]), nn.Identity()])


def dense_maps(encoder: Any, images: Tensor, taps: Taps) -> list[Tensor]:
    """Normalised [B, C, H, W] -> one [B, D, H/stride, W/stride] for each tap, sides rounded up, the last one normed.

    Sides that are no whole number of the coarsest tokens are padded with zeros (the mean colour) right and below.
    """
    unit = max(taps.strides)
    height, width = images.shape[-2:]
    images = torch.nn.functional.pad(images, (0, -width % unit, 0, -height % unit))
    depths = sorted(set(taps.indices))  # a ViT of fewer than four blocks is read twice at some
    read = encoder.forward_intermediates(
        images, indices=depths, output_fmt="NCHW", intermediates_only=True, norm=len(set(taps.strides)) == 1
    )
    maps: list[Tensor] = [read[depths.index(i)] for i in taps.indices]
    if len(set(taps.strides)) > 1:
        norm = encoder.norm  # timm norms none of a Swin's maps; the last stage's norm is trained and stays in use
        maps[-1] = norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, taps.strides, strict=True)]
