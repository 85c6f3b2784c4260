"""What objectives ask of encoders, and what they get: passes, tokens, batches.

An objective declares its encoder passes as `Forward` objects and later looks up the tokens under the same objects. Two
equal `Forward`s are one pass: this equality is the whole sharing rule. Shapes: B images, V crops of a view group,
N patches, D width; crops are stacked view-major, so row `v * B + b` is crop v of image b. Masks: True = hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .schedule import Progress

__all__ = ["Batch", "EncoderSpec", "Forward", "Modality", "Progress", "Tokens", "union"]


@dataclass(frozen=True)
class Forward:
    """One encoder pass that an objective needs. Two equal requests are computed once."""

    net: str
    """`student`, `teacher`, or the name of a frozen encoder of the recipe"""
    view: str
    """a view group of the recipe, e.g. `global` (2 crops stacked)"""
    mask: str | None = None
    """a mask of the recipe; it belongs to the same view"""
    drop: bool = False
    """True: hidden patches are removed (MAE); False: they are replaced by the mask token (SimMIM, iBOT)"""
    positions: bool = True
    """False: patches come without their positions, as a set (jigsaw)"""
    beside: tuple[str, ...] = ()
    """views of other modalities whose tokens follow those of `view`; the mask is over all of them (MultiMAE)"""
    layers: int = field(default=0, compare=False)
    """how many of the last blocks' outputs are wanted as well; no part of the equality: the pass with the most serves
    all"""

    def __post_init__(self) -> None:
        assert self.mask is not None or not self.drop, "dropping patches needs a mask"
        assert self.positions or self.drop or self.mask is None, "mask tokens without positions are all the same"
        assert not self.beside or (self.drop and self.positions), "tokens of other modalities come with some dropped"

    def __str__(self) -> str:
        how = "" if self.mask is None else f", {self.mask} {'dropped' if self.drop else 'masked'}"
        return f"{self.net} {'+'.join((self.view, *self.beside))}{how}{'' if self.positions else ', no positions'}"


class Tokens(NamedTuple):
    """What an encoder pass returns, after the encoder's last norm."""

    cls: Tensor
    """[V*B, D] what timm pools: class token, or average of the patches"""
    patches: Tensor
    """[V*B, N, D]; [V*B, visible, D] in ascending position when the mask was dropped, modality by modality"""
    layers: tuple[Tensor, ...] = ()
    """outputs of the last blocks in order, as many as asked for or more: each like `patches`, before the last norm"""


class Batch(NamedTuple):
    """One micro-batch; a tuple of mappings, so that Accelerate and DDP can move it."""

    views: Mapping[str, Tensor]
    """name -> [V*B, C, H, W]; uint8 from the loader, normalised float inside `Objective.loss`"""
    masks: Mapping[str, Tensor]
    """name -> [V*B, N] bool, True = hidden; of a multiblock mask also NAME.targets -> [V*B, T, N], True = to predict;
    for a view with `corrupt` VIEW.pixels -> [V*B, H*W], True = not the clean view's pixel"""
    labels: Tensor | None = None
    """[B] int64, or None: labels are optional everywhere"""
    ids: Tensor | None = None
    """[B] int64, stable sample numbers"""
    hidden: Mapping[str, Tensor] | None = None
    """name -> [n] flat numbers of the hidden tokens in [V*B*N], from the loader: on a device `nonzero` would wait"""

    def hidden_rows(self, mask: str) -> Tensor:
        """Flat positions of the hidden tokens of `mask` in [V*B*N]; int64 [n], ascending."""
        if self.hidden is not None and mask in self.hidden:
            return self.hidden[mask]
        return self.masks[mask].flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class Modality:
    """What a view holds that does not show the images themselves: depth, label maps."""

    patch: int
    """pixels of one token's side"""
    channels: int = 1
    classes: int | None = None
    """of a label map, whose ids are 0 .. classes - 1, and `classes` for pixels without label; None: continuous"""
    standardise: bool = True
    """continuous: each crop is standardised by its middle values"""


class _Known(dict[str, Any]):
    misfits: Mapping[str, str] = {}

    def __missing__(self, view: str) -> Any:
        if view in self.misfits:
            raise ValueError(f"view {view!r}: {self.misfits[view]}")
        raise ValueError(f"an objective asks for view {view!r}; the recipe's views are: {', '.join(self) or 'none'}")


@dataclass(frozen=True)
class EncoderSpec:
    """What an objective may know of the encoder: widths and grids, never the module itself."""

    dim: int
    stride: int
    """pixels of one output token's side: the patch size of a ViT, 32 for most Swins"""
    in_chans: int = 3
    family: Literal["vit", "swin", "pooled"] = "vit"
    """`pooled`: another timm family, whose patches cannot be masked"""
    depth: int = 12
    """number of blocks"""
    layers: int | None = None
    """blocks at the end whose outputs a pass can return: all of a ViT, the last stage of a Swin; None: `depth`"""
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """view -> (rows, columns) of output tokens"""
    crops: Mapping[str, int] = field(default_factory=dict)
    """view -> number of crops V"""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """view -> (height, width) in pixels"""
    misfits: Mapping[str, str] = field(default_factory=dict)
    """view -> why it has no grid: no pass may read it, but an objective may (a tokenizer's picture)"""
    mean: tuple[float, ...] = ()
    """per channel in 0..1, what was subtracted from the images; empty: nothing"""
    std: tuple[float, ...] = ()
    """per channel in 0..1, what they were divided by then"""
    frozen: Mapping[str, EncoderSpec] = field(default_factory=dict)
    """name -> the same of a frozen encoder, for the views that fit it"""
    modalities: Mapping[str, Modality] = field(default_factory=dict)
    """view -> its modality, for views of other things than the images"""
    made: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """view -> what its crops went through that an objective may rely on, as in `turns`; a view that is not in it may
    have gone through anything"""

    def __post_init__(self) -> None:
        for name in ("grids", "crops"):  # an objective that asks for an unknown view gets a sentence, not a KeyError
            object.__setattr__(self, name, _Known(getattr(self, name)))
        self.grids.misfits = self.misfits  # type: ignore[attr-defined]  # a _Known since the line above

    def tokens(self, view: str) -> int:
        """N, the number of patches of one crop of `view`."""
        rows, columns = self.grids[view]
        return rows * columns

    def of(self, net: str) -> EncoderSpec:
        """What may be known of the encoder behind `Forward.net`.

        Raises:
            ValueError: the recipe has no frozen encoder of this name.
        """
        if net in ("student", "teacher"):
            return self
        if net not in self.frozen:
            known = ", ".join(self.frozen) or "none"
            raise ValueError(
                f"there is no frozen encoder {net!r}; the recipe's section `frozen` has: {known}. For example "
                f"frozen.{net}={{of: teacher, after: 50%}}"
            )
        return self.frozen[net]

    def modality(self, view: str) -> Modality:
        """What `view` holds; ValueError when it shows the images."""
        if view not in self.modalities:
            known = ", ".join(self.modalities) or "none"
            raise ValueError(
                f"view {view!r} is of no other modality; views that are: {known}. For example data.modalities.depth="
                f"{{column: depth}} and views.{view}={{like: rgb, modality: depth}}"
            )
        return self.modalities[view]

    def require(self, view: str, option: str, example: str = "") -> None:
        """ValueError unless the crops of `view` were made with the option; `example` is its setting, unless the option
        has it, as in `like=global`."""
        if view in self.made and option not in self.made[view]:
            setting = f"{option}={example}" if example else option
            raise ValueError(f"view {view!r} has to be made with {option}: set views.{view}.{setting}")


def union(requests: Iterable[Forward]) -> tuple[Forward, ...]:
    """The passes to run: each distinct request once, in the order of first mention, with the most layers asked for."""
    passes: dict[Forward, Forward] = {}
    for request in requests:
        known = passes.get(request)
        passes[request] = known if known is not None and known.layers >= request.layers else request
    return tuple(passes.values())


def visible_rows(mask: Tensor, visible: int) -> Tensor:
    """Positions of the visible tokens, ascending: [R, N] bool -> [R, visible] int64. `visible` is equal in all rows."""
    return torch.argsort(mask.to(torch.uint8), dim=1, stable=True)[:, :visible]  # no sync: the count is known


def hidden_columns(mask: Tensor, hidden: int) -> Tensor:
    """Positions of the hidden tokens, ascending: [R, N] bool -> [R, hidden] int64. `hidden` is equal in all rows."""
    return torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :hidden]
