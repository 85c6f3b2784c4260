"""The strict base of every configuration class: unknown keys, wrong types and non-finite numbers are refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all recipe sections.

    Each class that is configured from a recipe owns a `Settings` subclass that stands beside it, with every
    default visible. Instances are frozen: a resolved recipe never changes while a run lasts.
    """

    model_config = ConfigDict(
        extra="forbid",  # a typo is an error, never ignored
        frozen=True,
        strict=True,  # "0.1" is no number, 1 is no bool
        validate_default=True,
        allow_inf_nan=False,  # lr: .nan would train to a NaN encoder
        populate_by_name=True,
    )
