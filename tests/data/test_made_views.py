"""Views that are made for one objective: turned, shifted, pasted, corrupted."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hybrid_ssl.data.settings import ViewSettings
from hybrid_ssl.data.views import Views


def picture(height: int = 60, width: int = 80, channels: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=draw, dtype=torch.uint8)


def test_turned_crops_are_one_square_turned_exactly() -> None:
    view = ViewSettings(size=32, crops=4, turns=True, scale=[0.1, 1.0])
    seen = set()
    for i in range(5):
        crops = Views({"turned": view})(picture(), 0, 0, i)["turned"]
        assert all(torch.equal(crops[k], crops[0].rot90(k, (1, 2))) for k in range(4))
        seen.add(crops[0].numpy().tobytes())
    assert len(seen) == 5
    upright = ViewSettings(size=32, scale=[0.1, 1.0])
    assert torch.equal(Views({"turned": upright})(picture(), 0, 0, 4)["turned"][0], crops[0])


@pytest.mark.parametrize("wrong", [{"crops": 5}, {"size": [32, 40]}, {"vflip": 0.5}])
def test_turns_of_anything_but_squares_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="up to 4 crops of a square"):
        ViewSettings.model_validate({"turns": True, "crops": 4, **wrong})
