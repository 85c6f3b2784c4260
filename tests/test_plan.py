"""Equal requests are one pass, which gives the same gradients as separate ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_ssl.assemble import build_loader, build_pretrainer, describe_plan, lay_out
from hybrid_ssl.config import Recipe
from hybrid_ssl.data.sources import open_source
from hybrid_ssl.encoder import Encoder
from hybrid_ssl.plan import Batch, EncoderSpec, Forward, Progress, hidden_columns, union, visible_rows
from hybrid_ssl.pretrainer import Pretrainer
from tests.runs import HEAD, MAE_ENTRY, MOCO_ENTRY, PATCH_HEAD, tiny_recipe

SHARED = {
    "dino": HEAD | {"mask": "block"},
    "ibot": PATCH_HEAD,
    "moco": MOCO_ENTRY | {"name": "moco_v3", "mask": "block"},
}


def build(recipe: Recipe) -> tuple[Pretrainer, Batch]:
    """In float64, with one batch."""
    layout = lay_out(recipe, 1)
    pretrainer = build_pretrainer(recipe, [0.3], [0.3], layout=layout).double()
    loader = build_loader(recipe, open_source(recipe.data), pretrainer, layout, total_steps=10)
    return pretrainer, next(loader.iterate())


def count_passes(pretrainer: Pretrainer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    original = type(pretrainer.student).forward

    def counted(self: Encoder, images: Tensor, *args: Any, **options: Any) -> Any:
        seen.append("teacher" if self is pretrainer.teacher else "student")
        return original(self, images, *args, **options)

    monkeypatch.setattr(type(pretrainer.student), "forward", counted)
    return seen


def test_union_keeps_each_request_once_in_order() -> None:
    a, b, c = Forward("student", "global"), Forward("student", "global", "block"), Forward("teacher", "global")
    assert union([a, b, Forward("student", "global"), c, b]) == (a, b, c)
    assert len({a, Forward("student", "global"), Forward("student", "global", "block", drop=True)}) == 2


def test_dropping_needs_a_mask() -> None:
    with pytest.raises(AssertionError):
        Forward("student", "global", drop=True)


def test_pass_says_what_it_is() -> None:
    assert str(Forward("student", "plain", "random", drop=True)) == "student plain, random dropped"
    assert str(Forward("student", "global", "block")) == "student global, block masked"
    assert str(Forward("teacher", "global")) == "teacher global"


def test_three_objectives_share_their_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrainer, batch = build(tiny_recipe(SHARED))
    lines = describe_plan(pretrainer)
    assert lines[0] == "plan: 3 encoder passes for 8 requested"
    assert "sharing saves" in lines[-1]
    seen = count_passes(pretrainer, monkeypatch)
    pretrainer(batch, Progress(0, 10, 8))
    assert sorted(seen) == ["student", "student", "teacher"]  # global masked, local; global


def test_sharing_gives_the_gradients_of_separate_passes() -> None:
    """Of three objectives on one pass, against the sum of three backward passes with one objective each."""
    same_size = {"size": 16, "crops": 2}  # timm resamples positions in float32
    recipe = tiny_recipe(SHARED, encoder={"drop_path": 0.0}, views={"local": same_size})  # noise belongs to a pass
    together, batch = build(recipe)
    now = Progress(0, 10, 8)
    together(batch, now)[0].backward()
    expected: dict[str, Tensor] = {}
    for label in SHARED:
        alone, _ = build(recipe)
        alone.weights = {name: float(name == label) for name in alone.weights}
        terms = alone(batch, now)
        terms[0].backward()
        for name, parameter in alone.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, torch.zeros_like(parameter)) + parameter.grad
    found = {name: p.grad for name, p in together.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_cost_counts_the_visible_tokens_only() -> None:
    def cost(ratio: float) -> float:
        recipe = tiny_recipe(
            {"mae": MAE_ENTRY},
            encoder={"args": {"patch_size": 4}},  # 5 M parameters: enough to be seen in GFLOP
            masks={"random": {"kind": "random", "view": "plain", "ratio": ratio}},
        )
        pretrainer = build_pretrainer(recipe, [0.3], [0.3], layout=lay_out(recipe, 1))
        return float(describe_plan(pretrainer)[1].split()[-4])

    few, many = cost(0.75), cost(0.25)  # 4 and 12 of 16 patches, and the class token
    assert many / few == pytest.approx(13 / 5, rel=0.05)


def test_unknown_view_is_a_sentence() -> None:
    spec = EncoderSpec(dim=8, stride=4, grids={"plain": (2, 2)}, crops={"plain": 1})
    assert spec.tokens("plain") == 4
    with pytest.raises(ValueError, match="asks for view 'global'; the recipe's views are: plain"):
        spec.tokens("global")


def test_positions_of_visible_and_hidden_tokens_ascend() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert visible_rows(mask, 2).tolist() == [[1, 3], [0, 1]]
    assert hidden_columns(mask, 2).tolist() == [[0, 2], [2, 3]]
    batch = Batch({}, {"m": mask})
    assert batch.hidden_rows("m").tolist() == [0, 2, 6, 7]
    assert batch._replace(hidden={"m": torch.tensor([5])}).hidden_rows("m").tolist() == [5]
