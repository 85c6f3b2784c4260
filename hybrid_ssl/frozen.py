"""Frozen encoders: encoders of a run beside student and teacher that learn nothing, for objectives to compare with.

A recipe names them under `frozen`, an objective asks for `Forward(name, view)`. Two sources:

    frozen:
      gram: {of: teacher, after: 50%, every: 5%, max_updates: 3}   # the teacher as it was at some step of this run
      start: {of: student}                                         # the student before its first step
      large: {weights: ./runs/vitl/encoder}                        # an exported folder, or a timm model's weights
      wide: {weights: vit_large_patch14_dinov2, size: 224}         # which looks at small views enlarged

The first is what Gram anchoring compares with (DINOv3, arXiv 2508.10104), the second keeps continued training near its
start, the others are teachers to distil. Copies are taken after the step before the named one, so the schedule depends
on the step alone; they are part of the checkpoint. Given weights are not: a resumed run reads them again, and only with
the same `digest`. They get images normalised as they were trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from .plan import Tokens
from .schedule import Duration, Progress, to_steps
from .settings import Settings

if TYPE_CHECKING:  # recipes are read without waiting for timm
    from .encoder import Encoder


class FrozenSettings(Settings):
    """One frozen encoder: a copy of this run's student or teacher, or given weights."""

    of: Literal["teacher", "student"] | None = None
    """what is copied"""
    weights: str | None = None
    """instead of a copy: a timm model name for timm's weights, or whatever else `encoder.init` takes"""
    name: str | None = None
    """of weights in a checkpoint file: the timm model that they are for"""
    size: int | list[int] | None = None
    """of given weights: height and width in pixels to which views are resized for it; null: it sees them as they are"""
    after: Duration = "0 steps"
    """when the copy is taken; before that it holds the initial weights, so give its objective no weight until then"""
    every: Duration | None = None
    """how often it is taken again; null: never"""
    max_updates: int | None = Field(None, ge=1)
    """how often at most it is taken again; null: without end"""

    @model_validator(mode="after")
    def _one_source(self) -> FrozenSettings:
        if (self.of is None) == (self.weights is None):
            raise ValueError("a frozen encoder is a copy `of` the teacher or student, or has given `weights`: set one")
        if self.weights is not None and (self.after, self.every, self.max_updates) != ("0 steps", None, None):
            raise ValueError("given weights stay as they are: leave out after, every and max_updates, or set `of`")
        if self.max_updates is not None and self.every is None:
            raise ValueError("max_updates needs `every`, the time between two updates")
        if self.name is not None and self.weights is None:
            raise ValueError("a copy is of the student's kind: name is for given `weights`")
        if self.size is not None and self.weights is None:
            raise ValueError("a copy sees the views as its original does: size is for given `weights`")
        if isinstance(self.size, list) and len(self.size) != 2 or min(self.height_width or (1, 1)) < 1:
            raise ValueError(f"size is a number of pixels or [height, width], got {self.size}")
        return self

    @property
    def height_width(self) -> tuple[int, int] | None:
        """Of `size`."""
        if isinstance(self.size, list):
            return (self.size[0], self.size[-1])
        return None if self.size is None else (self.size, self.size)


class Frozen(nn.Module):
    """An encoder that only looks, and the schedule by which it is copied anew.

    Args:
        encoder: a copy of the student, or the given one.
        cfg: the recipe's section.
        mean, std: of the run, per channel in 0..1; views come normalised with them.
        own: (mean, std) that the encoder expects; None: the run's.

    Attributes:
        digest: sha256 of given weights, first 16 digits; None for a copy.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        encoder: Encoder,
        cfg: FrozenSettings,
        mean: Sequence[float],
        std: Sequence[float],
        own: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.mask_token = None  # it sees whole images
        self.encoder.requires_grad_(False)
        self.cfg, self.renormalises = cfg, own is not None
        own_mean, own_std = (torch.tensor(values) for values in own or (mean, std))
        shape = (1, -1, 1, 1)
        self.register_buffer("scale", (torch.tensor(std) / own_std).view(shape), persistent=False)
        self.register_buffer("shift", ((torch.tensor(mean) - own_mean) / own_std).view(shape), persistent=False)
        self.eval()
        self.digest = None if cfg.weights is None else _digest(encoder)
        if cfg.weights is not None:
            self.register_state_dict_post_hook(_leave_out)
            self.register_load_state_dict_pre_hook(_keep_own)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tokens:
        """[R, C, H, W], normalised as the run does it, -> tokens without gradient."""
        size = self.cfg.height_width
        if size is not None and images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        if self.renormalises:
            images = images * self.scale + self.shift
        tokens: Tokens = self.encoder(images)
        return tokens

    def train(self, mode: bool = True) -> Frozen:
        """Stays in `eval`."""
        return super().train(False)

    def due(self, now: Progress) -> bool:
        """Whether step `now` is to be run with a new copy."""
        if self.cfg.of is None:
            return False
        first, every = (
            None if text is None else round(to_steps(text, now.total_steps, now.steps_per_epoch))
            for text in (self.cfg.after, self.cfg.every)
        )
        passed = now.step - (first or 0)
        if passed <= 0 or every is None:
            return passed == 0
        updates, rest = divmod(passed, max(1, every))
        return rest == 0 and updates <= (self.cfg.max_updates or updates)

    @torch.no_grad()
    def copy_from(self, source: Encoder) -> None:
        """Take over the weights of an encoder of the same kind."""
        theirs = dict(source.model.named_parameters()) | dict(source.model.named_buffers())
        for name, own in [*self.encoder.model.named_parameters(), *self.encoder.model.named_buffers()]:
            own.copy_(theirs[name])


def _digest(encoder: nn.Module) -> str:
    """Of all names and values of the encoder."""
    found = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A checkpoint holds no weights that stand elsewhere: those of a large teacher are most of its bytes."""
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def _keep_own(module: Frozen, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """So that loading misses nothing."""
    state |= module.encoder.state_dict(prefix=f"{prefix}encoder.")
