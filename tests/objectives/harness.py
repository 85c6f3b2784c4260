"""What the tests of all objectives share: hand-made tokens, and the claims that every objective has to meet.

No encoder takes part: tokens are random leaves, view-major like the real ones. A test module names its claims:

    CASES = {"whole": {}, "masked": {"mask": "block"}}  # label -> settings of the objective

    @pytest.mark.parametrize("case", CASES)
    def test_every_parameter_gets_a_gradient(case): harness.check_gradients("moco_v3", CASES[case])

    def test_two_ranks_equal_one(): harness.check_two_ranks("moco_v3", CASES)
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_ssl.nn.distributed import rank, world_size
from hybrid_ssl.objectives import objective_class
from hybrid_ssl.objectives.base import Objective
from hybrid_ssl.plan import Batch, EncoderSpec, Forward, Modality, Progress, Tokens
from tests.ranks import run_two_ranks

SPEC = EncoderSpec(
    dim=32,
    stride=8,
    depth=2,
    grids={"global": (4, 4), "local": (2, 2), "plain": (4, 4)},
    crops={"global": 2, "local": 3, "plain": 1},
    frozen={"gram": EncoderSpec(dim=20, stride=8, grids={"global": (4, 4)}, crops={"global": 2})},
)
Inputs = tuple[dict[Forward, Tokens], Batch]
Settings = Mapping[str, Any]


def build(
    name: str, settings: Settings, spec: EncoderSpec = SPEC, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Objective:
    """The objective with weights that depend on `seed` alone."""
    kind = objective_class(name)
    torch.manual_seed(seed)
    return kind(kind.Config(name=name, **settings), spec).to(dtype)


def now(step: int = 0) -> Progress:
    return Progress(step=step, total_steps=100, steps_per_epoch=10)


def draw_mask(rows: int, patches: int, ragged: bool, draw: torch.Generator) -> Tensor:
    """[rows, patches] bool. Ragged: 0 to half of the patches hidden, none in the first row; else 3/4 in each row."""
    order = torch.rand(rows, patches, generator=draw).argsort(dim=1)
    counts = torch.randint(1, patches // 2 + 1, (rows, 1), generator=draw) if ragged else torch.tensor(patches * 3 // 4)
    mask = order < counts
    if ragged:
        mask[0] = False
    return mask


def draw_targets(hidden: Tensor, seed: int, targets: int = 2, tokens: int = 3) -> Tensor:
    """[rows, targets, patches] bool: so many of the hidden patches in each target."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(hidden), targets, hidden.shape[1], generator=draw) + hidden.unsqueeze(1)
    return noise.argsort(dim=2, descending=True).argsort(dim=2) < tokens


def draw_view(spec: EncoderSpec, view: str, rows: int, draw: torch.Generator) -> Tensor:
    """Noise like images of the view, or like maps of its modality."""
    kind = spec.modalities.get(view, Modality(spec.stride, spec.in_chans))
    shape = (rows, kind.channels, *(kind.patch * n for n in spec.grids[view]))
    if kind.classes is None:
        return torch.randn(shape, generator=draw)
    return torch.randint(kind.classes + 1, shape, generator=draw).to(torch.int16)


def make_inputs(
    needs: Sequence[Forward],
    images: int = 4,
    seed: int = 0,
    spec: EncoderSpec = SPEC,
    dtype: torch.dtype = torch.float64,
    masks: Mapping[str, Tensor] | None = None,
) -> Inputs:
    """Random tokens for each pass, and the batch they could have come from. The student's tokens are leaves."""
    draw = torch.Generator().manual_seed(seed)
    views = {view: draw_view(spec, view, v * images, draw) for view, v in spec.crops.items()}
    drawn = dict(masks or {})
    for need in needs:
        if need.mask is not None and need.mask not in drawn:
            rows = spec.crops[need.view] * images
            tokens_of_all = spec.tokens(need.view) * (1 + len(need.beside))
            drawn[need.mask] = draw_mask(rows, tokens_of_all, not need.drop, draw)
        if need.drop and f"{need.mask}.targets" not in drawn:
            drawn[f"{need.mask}.targets"] = draw_targets(drawn[need.mask or ""], seed)
    for view, made in spec.made.items():
        if "corrupt" in made:
            drawn[f"{view}.pixels"] = torch.rand(views[view].shape[0], views[view][0, 0].numel(), generator=draw) < 0.4
    tokens = {}
    for need in needs:
        patches, dim = spec.of(need.net).tokens(need.view), spec.of(need.net).dim
        if need.drop:
            patches = int((~drawn[need.mask or ""][0]).sum())
        x = torch.randn(spec.crops[need.view] * images, 1 + patches, dim, generator=draw, dtype=torch.float64)
        leaves = (part.to(dtype).contiguous().requires_grad_(need.net == "student") for part in (x[:, 0], x[:, 1:]))
        outputs = (torch.randn(x[:, 1:].shape, generator=draw, dtype=torch.float64) for _ in range(need.layers))
        tokens[need] = Tokens(*leaves, layers=tuple(output.to(dtype) for output in outputs))
    labels = torch.randint(3, (images,), generator=draw)
    batch = Batch(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in views.items()}, drawn, labels, torch.arange(images)
    )
    return tokens, batch


def share(inputs: Inputs, part: int, parts: int, spec: EncoderSpec = SPEC) -> Inputs:
    """What process `part` of `parts` would get of the global batch."""
    tokens, batch = inputs
    assert batch.labels is not None and batch.ids is not None
    images = len(batch.labels)
    rows = slice(part * images // parts, (part + 1) * images // parts)

    def cut(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, images))[:, rows].flatten(0, 1)

    cut_tokens = {
        need: Tokens(
            *(cut(x.detach()).requires_grad_(x.requires_grad) for x in both[:2]), tuple(cut(x) for x in both.layers)
        )
        for need, both in tokens.items()
    }
    cut_batch = Batch(
        {k: cut(v) for k, v in batch.views.items()},
        {k: cut(v) for k, v in batch.masks.items()},
        batch.labels[rows],
        batch.ids[rows],
    )
    return cut_tokens, cut_batch


def train(
    objective: Objective, steps: int = 3, images: int = 4, lr: float = 0.1, spec: EncoderSpec = SPEC
) -> dict[str, Any]:
    """A few steps of gradient descent on given tokens, gradients averaged over processes as DDP does.

    Returns losses (means over processes), the gradients of the last step and the final state.
    """
    losses = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        tokens, batch = share(make_inputs(objective.needs, images, seed=step, spec=spec), rank(), world_size(), spec)
        objective.zero_grad()
        loss = objective.loss(tokens, batch, now(step))["loss"]
        loss.backward()
        losses.append(average(loss.detach()))
        gradients = {n: average(p.grad) for n, p in objective.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                if name in gradients:
                    parameter -= lr * gradients[name]
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    return {"losses": losses, "gradients": gradients, "state": state}


def average(x: Tensor) -> Tensor:
    if world_size() == 1:
        return x.clone()
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def train_all(name: str, cases: Mapping[str, Settings], spec: EncoderSpec = SPEC) -> dict[str, Any]:
    return {label: train(build(name, settings, spec), spec=spec) for label, settings in cases.items()}


# The claims


def check_gradients(name: str, settings: Settings, spec: EncoderSpec = SPEC) -> None:
    """Every trainable parameter and every student token pass gets a gradient that is not zero; teachers get none."""
    objective = build(name, settings, spec)
    tokens, batch = make_inputs(objective.needs, spec=spec)
    logs = objective.loss(tokens, batch, now())
    logs["loss"].backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    for need, both in tokens.items():
        got = any(x.grad is not None and bool(x.grad.any()) for x in both[:2])
        assert got == (need.net == "student"), str(need)
    assert all(v.ndim == 0 and not v.requires_grad for k, v in logs.items() if k != "loss")
    for teacher, student in objective.ema_pairs():
        assert not any(p.requires_grad for p in teacher.parameters())
        same = zip(teacher.named_parameters(), student.named_parameters(), strict=True)
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in same)


def check_state(name: str, settings: Settings, spec: EncoderSpec = SPEC) -> None:
    """Saved after two steps and loaded into other weights, it goes on with the same bits."""
    first, second = build(name, settings, spec), build(name, settings, spec, seed=1)
    train(first, steps=2, spec=spec)
    second.load_state_dict(first.state_dict())
    for step in (2, 3):
        inputs = make_inputs(first.needs, seed=step, spec=spec)
        one, two = (objective.loss(*inputs, now(step)) for objective in (first, second))
        assert all(torch.equal(one[key], two[key]) for key in one)


def check_two_ranks(name: str, cases: Mapping[str, Settings], spec: EncoderSpec = SPEC) -> None:
    """Two processes with half the images each: the same losses, gradients and state as one, in float64."""
    alone = train_all(name, cases, spec)
    for result in run_two_ranks(train_all, name, cases, spec):
        torch.testing.assert_close(result, alone, rtol=1e-9, atol=1e-11)  # a failure names the case and the tensor


def check_half_precision(name: str, settings: Settings, rtol: float = 0.02, spec: EncoderSpec = SPEC) -> None:
    """bf16 and fp16 tokens give a finite float32 loss near the float32 one, with autocast or without."""
    whole = build(name, settings, spec, dtype=torch.float32)
    tokens, batch = make_inputs(whole.needs, spec=spec, dtype=torch.float32)
    expected = whole.loss(tokens, batch, now())["loss"]
    for dtype in (torch.bfloat16, torch.float16):
        for autocast in (True, False):
            objective = build(name, settings, spec, dtype=torch.float32)
            tokens, batch = make_inputs(objective.needs, spec=spec, dtype=dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                loss = objective.loss(tokens, batch, now())["loss"]
            loss.backward()
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected, rtol=rtol, atol=0)
            assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def overfit(name: str, settings: Settings, steps: int = 60, lr: float = 1e-2) -> list[float]:
    """Losses of training the heads and a linear encoder on the same eight images, with a teacher that follows.

    The crops of an image share most of their values. Features may not become one on the way.
    """
    objective = build(name, settings)
    inputs, batch = make_inputs(objective.needs, images=8)
    draw = torch.Generator().manual_seed(1)
    content = torch.randn(8, SPEC.dim, generator=draw, dtype=torch.float64)
    pixels = {need: [_near(content, x.detach()) for x in both[:2]] for need, both in inputs.items()}
    student = torch.nn.Linear(SPEC.dim, SPEC.dim).double()
    teacher = deepcopy(student)
    pairs = [(teacher, student), *objective.ema_pairs()]
    trained = [p for p in [*student.parameters(), *objective.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses = []
    for step in range(steps):
        tokens = {
            need: Tokens(*((student if need.net == "student" else teacher)(x) for x in both))
            for need, both in pixels.items()
        }
        loss = objective.loss(tokens, batch, now(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in pairs:
                for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
                    a.lerp_(b, 0.1)
        losses.append(loss.item())
    assert student(content).std(dim=0).mean() > 0.1, "all images got the same feature"
    return losses


def _near(content: Tensor, noise: Tensor) -> Tensor:
    """[V*8, ..., D] noise, view-major -> the image's content with a third of noise."""
    images = content.repeat(len(noise) // len(content), 1)
    return (images if noise.ndim == 2 else images.unsqueeze(1)) + noise / 3
