"""Numbers that cannot be meant are refused when the recipe is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hybrid_ssl.data.settings import BlockMask, DataSettings, JitterSettings, ViewSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [32]}, "height, width"),
        ({"size": 0}, "must be from 1 to 8192 pixels, got 0"),
        ({"scale": [0.5, 0.2]}, "low <= high"),
        ({"scale": [0.0, 1.0]}, "0 < low"),
        ({"scale": [0.5, 2.0]}, "<= 1"),
        ({"ratio": [0.0, 1.0]}, "0 < low"),
        ({"blur_sigma": [0.0, 2.0]}, "0 < low"),
        ({"crops": 2, "blur": [0.1, 0.2, 0.3]}, "blur lists 3 probabilities for 2 crops"),
        ({"crops": 2, "jitter": JitterSettings(p=[0.5])}, "jitter.p lists 1"),
        ({"gray": 1.5}, "less than or equal to 1"),
    ],
)
def test_views_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ratio": [0.5, 0.1]}, "low <= high"), ({"ratio": [0.1, 1.0]}, "high < 1"), ({"aspect": [0.0, 1.0]}, "0 < low")]
    + [({"start": "soon"}, "no duration")],
)
def test_masks_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BlockMask(kind="block", view="global", **changes)


def test_data_that_makes_no_sense() -> None:
    with pytest.raises(ValidationError, match="low < high"):
        DataSettings(source="-", value_range=[1.0, 1.0])
    with pytest.raises(ValidationError, match="channels"):
        DataSettings(source="-", channels=0)
