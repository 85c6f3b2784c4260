"""docs/objectives.md is what `tools/document_objectives.py` writes from the code of today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hybrid_ssl.objectives import OBJECTIVES

TOOL = Path(__file__).parents[1] / "tools/document_objectives.py"


def test_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("document_objectives", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.NOTES.keys() == OBJECTIVES.keys()
    assert tool.TARGET.read_text() == tool.document(), "run: python tools/document_objectives.py"
