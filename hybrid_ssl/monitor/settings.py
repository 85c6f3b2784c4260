"""The recipe section `monitor`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..schedule import Duration
from ..settings import Settings


class MonitorSettings(Settings):
    """What is measured while a run trains, and what happens when it goes wrong."""

    log_every: int = Field(20, ge=1)
    """steps between two log lines; the loop waits for the device only then"""
    probe_every: Duration | None = "5%"
    """k-NN (with labels) or feature statistics (without); null: only at the end"""
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    feature_images: int = Field(1024, ge=8)
    """images for the feature statistics when there are no labels"""
    on_collapse: Literal["stop", "warn"] = "warn"
    collapse_std: float = Field(0.01, ge=0)
    """normalised feature std below which a probe counts as collapsed; three in a row are acted on"""
    max_skipped: int = Field(3, ge=1)
    """consecutive steps with a non-finite loss or gradient before the run stops with exit code 3"""
