"""What every objective is: a declaration of encoder passes, and a loss on their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from ..plan import Batch, EncoderSpec, Forward, Progress, Tokens
from ..schedule import Duration, Ramp, Value, within
from ..settings import Settings


class ObjectiveSettings(Settings):
    """Common part of every objective's `Config`."""

    name: str
    """a name of `hybrid_ssl.objectives.OBJECTIVES`, or `my_package.my_module:MyObjective`"""
    weight: Annotated[Value, within(0, 1e6)] = 1.0
    """factor of this objective's loss in the sum; a number or a ramp"""


def _positive(value: float | Ramp) -> float | Ramp:
    ends = (value.start, value.end) if isinstance(value, Ramp) else (value,)
    if min(ends) <= 0:
        raise ValueError(f"a temperature must be above 0, got {min(ends)}")
    return value


Temperature = Annotated[Value, AfterValidator(_positive)]
"""A positive number, or a `Ramp` between two."""


@dataclass(frozen=True)
class ParamRule:
    """An exception for some parameters of an objective.

    Attributes:
        params: the parameters it is for.
        lr_scale: factor on the learning rate.
        weight_decay: replaces the run's weight decay (0.0: none); None keeps it.
        hold: gradients are dropped (set to None) for this long, so that moments and step counts stand still too.
        constant_lr: the learning rate keeps its base value instead of following the schedule (SimSiam's predictor).
        warm: after `hold` the learning rate grows from 0 over the run's warm-up once more.
    """

    params: tuple[nn.Parameter, ...]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    hold: Duration | None = None
    constant_lr: bool = False
    warm: bool = False


class Objective(nn.Module):
    """Base class. A subclass sets `Config` and, in `__init__`, `needs` (and `reads`); they stay constant afterwards."""

    Config: ClassVar[type[ObjectiveSettings]]
    needs: tuple[Forward, ...]
    reads: tuple[str, ...] = ()
    """views that the loss reads although no encoder pass does, e.g. a reconstruction's target"""
    target_masks: tuple[str, ...] = ()
    """masks whose blocks to be predicted the loss reads as `NAME.targets`; they are of kind multiblock"""
    compares_views: ClassVar[bool] = True
    """whether features of views are compared, so that they can collapse; False for pure reconstruction"""
    needs_labels: ClassVar[bool] = False
    """whether the loss reads `batch.labels`; data without labels is then refused before the run"""

    def __init__(self, cfg: ObjectiveSettings, encoder: EncoderSpec) -> None:
        super().__init__()

    def loss(self, tokens: Mapping[Forward, Tokens], batch: Batch, now: Progress) -> dict[str, Tensor]:
        """Scalars by name. `loss` is trained on; every other entry is detached and only logged."""
        raise NotImplementedError

    def ema_pairs(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """(teacher head, student head) pairs that follow the teacher's momentum."""
        return ()

    def param_rules(self) -> Iterable[ParamRule]:
        return ()


def crops_of(encoder: EncoderSpec, view: str) -> int:
    """V, the number of crops of `view`.

    Raises:
        ValueError: the recipe has no such view.
    """
    if view not in encoder.crops:
        raise ValueError(f"there is no view {view!r}; the recipe's views are: {', '.join(encoder.crops)}")
    return encoder.crops[view]


def number_crops(rows: Tensor, crops: int) -> Tensor:
    """For rows of V stacked crops [V*B, ...], the number 0 .. V-1 of each one's crop: int64 [V*B]."""
    return torch.arange(crops, device=rows.device).repeat_interleave(len(rows) // crops)


def check_two_crops(encoder: EncoderSpec, view: str, name: str) -> None:
    """ValueError unless `view` has the two crops that objective `name` compares."""
    if crops_of(encoder, view) != 2:
        raise ValueError(
            f"{name} compares the two crops of a view, but {view!r} has {encoder.crops[view]}: "
            f"set views.{view}.crops to 2"
        )
