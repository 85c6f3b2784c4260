from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_ssl.nn.gram import cosines, gram_loss, resize_patches
from hybrid_ssl.plan import EncoderSpec, Forward
from tests.objectives import harness

CASES = {
    "masked": {"frozen_view": "global"},
    "whole": {"frozen_view": "global", "mask": None},
}
LARGER = EncoderSpec(
    dim=32,
    stride=8,
    grids={"global": (4, 3), "gram": (8, 6)},
    crops={"global": 2, "gram": 2},
    frozen={"gram": EncoderSpec(dim=20, stride=8, grids={"global": (4, 3), "gram": (8, 6)}, crops={"gram": 2})},
)


def rows(seed: int, patches: int = 12, dim: int = 32, images: int = 5) -> Tensor:
    return torch.randn(images, patches, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(student: Tensor, target: Tensor) -> Tensor:
    terms = []
    for s, g in zip(student, target, strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                difference = F.cosine_similarity(s[i], s[j], dim=0) - F.cosine_similarity(g[i], g[j], dim=0)
                terms.append(difference**2)
    return torch.stack(terms).mean()


def test_loss_equals_a_loop_over_pairs_of_patches() -> None:
    student, target = rows(0), rows(1, dim=20)
    torch.testing.assert_close(gram_loss(student, target), loop(student, target))


def test_loss_equals_the_expansion_in_feature_space() -> None:
    """|X X' - Y Y'|^2 = |X'X|^2 + |Y'Y|^2 - 2 |X'Y|^2 for each image."""
    x, y = (F.normalize(features, dim=-1) for features in (rows(0), rows(1)))
    norms = [(a.transpose(1, 2) @ b).square().sum((1, 2)) for a, b in ((x, x), (y, y), (x, y))]
    torch.testing.assert_close(gram_loss(rows(0), rows(1)), (norms[0] + norms[1] - 2 * norms[2]).mean() / 12**2)


def test_images_never_meet() -> None:
    """An image's loss is its own: the mean over images, not a Gram matrix over the batch."""
    student, target = rows(0), rows(1)
    each = [gram_loss(student[i : i + 1], target[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(gram_loss(student, target), torch.stack(each).mean())


def test_loss_ignores_lengths_and_rotations_of_features() -> None:
    student, target = rows(0), rows(1)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    changed = (student @ rotation) * torch.linspace(0.1, 9, 12).unsqueeze(1)
    torch.testing.assert_close(gram_loss(changed, target), gram_loss(student, target))
    assert gram_loss(changed, student) < 1e-20


def test_negative_cosines_count() -> None:
    student, target = (torch.tensor([[[1.0, 0.0], [x, 1.0]]]) for x in (-1.0, 0.0))
    torch.testing.assert_close(gram_loss(student, target), torch.tensor(2 * 0.5 / 4))


def test_target_is_constant() -> None:
    student, target = rows(0).requires_grad_(), rows(1).requires_grad_()
    gram_loss(student, target).backward()
    assert student.grad is not None and student.grad.any() and target.grad is None


def test_half_precision_is_computed_in_float32() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = gram_loss(rows(0).bfloat16(), rows(1).bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, gram_loss(rows(0).bfloat16().float(), rows(1).bfloat16().float()))


def test_features_are_resized_as_maps() -> None:
    """A ramp over the columns of a 32 x 32 map is a ramp over those of 16 x 16, row-major."""
    column = torch.arange(32.0).expand(32, 32)
    maps = torch.stack((column, column.T)).flatten(1).T.unsqueeze(0)  # [1, 1024, 2]
    small = resize_patches(maps, (32, 32), (16, 16)).unflatten(1, (16, 16))
    inner = torch.arange(2, 14)
    torch.testing.assert_close(small[0, 5, 2:14, 0], 2 * inner + 0.5)
    torch.testing.assert_close(small[0, 2:14, 5, 1], 2 * inner + 0.5)
    assert resize_patches(maps, (32, 32), (32, 32)) is maps


def test_a_larger_view_is_resized_to_the_students_grid() -> None:
    objective = harness.build("gram", {}, LARGER)
    tokens, batch = harness.make_inputs(objective.needs, spec=LARGER)
    student, target = Forward("student", "global", "block"), Forward("gram", "gram")
    assert objective.needs == (student, target)
    maps = tokens[target].patches.transpose(1, 2).unflatten(2, (8, 6))
    small = F.interpolate(maps, size=(4, 3), mode="bicubic").flatten(2).transpose(1, 2)
    found = objective.loss(tokens, batch, harness.now())["loss"]
    torch.testing.assert_close(found, loop(tokens[student].patches, small))
    harness.check_gradients("gram", {}, LARGER)


def test_the_students_pass_is_dinov2s() -> None:
    dinov2 = harness.build("dinov2", {"out_dim": 8, "hidden": 8, "bottleneck": 4})
    assert harness.build("gram", CASES["masked"]).needs[0] == dinov2.needs[0]


def test_cosines_of_a_patch_with_itself_are_one() -> None:
    torch.testing.assert_close(cosines(rows(0)).diagonal(dim1=1, dim2=2), torch.ones(5, 12, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_the_student_alone_gets_a_gradient(case: str) -> None:
    harness.check_gradients("gram", CASES[case])


def test_state_round_trip() -> None:
    harness.check_state("gram", CASES["masked"])


def test_two_ranks_equal_one() -> None:
    def losses(parts: int) -> list[Tensor]:
        objective = harness.build("gram", CASES["masked"])
        inputs = harness.make_inputs(objective.needs)
        return [objective.loss(*harness.share(inputs, part, parts), harness.now())["loss"] for part in range(parts)]

    torch.testing.assert_close(torch.stack(losses(2)).mean(), losses(1)[0])  # no collective: the mean of the halves


def test_overfits_eight_images() -> None:
    """The student's features become as alike as those of another width."""
    target = rows(1, dim=20, images=8)
    student = rows(0, images=8).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = gram_loss(student, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]


def test_swins_grid_of_output_tokens() -> None:
    grids = {"global": (7, 6)}
    frozen = {"gram": EncoderSpec(dim=64, stride=16, grids={"global": (14, 12)}, crops={"global": 2})}
    spec = EncoderSpec(dim=48, stride=32, family="swin", grids=grids, crops={"global": 2}, frozen=frozen)
    harness.check_gradients("gram", CASES["masked"], spec)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="no frozen encoder 'other'; the recipe's section `frozen` has: gram"):
        harness.build("gram", {"encoder": "other", "frozen_view": "global"})
    with pytest.raises(ValueError, match=r"'gram' has 1 crops, 'global' has 2: set views.gram.like=global"):
        harness.build("gram", {}, replace(LARGER, crops={"global": 2, "gram": 1}))
    with pytest.raises(ValueError, match="view 'gram'"):
        harness.build("gram", {})
