"""What the tests of this folder share: one export of each family, one folder of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.downstream.tiny import export_tiny

from .tiny import SIDE, pictures


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: export_tiny(root / kind, kind, 3, SIDE) for kind in ("vit", "swin")}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"))
