"""Heads on encoders: weights arrive unchanged, the loss does not depend on how a batch is divided, and it falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hybrid_ssl.downstream.encoders import Taps, taps_of
from hybrid_ssl.downstream.segmentation.heads import Levels, UPerHead
from hybrid_ssl.downstream.segmentation.metrics import IGNORED
from hybrid_ssl.downstream.segmentation.model import Segmenter, pixel_loss, restore
from hybrid_ssl.downstream.segmentation.settings import SegmentationModel
from tests.downstream.segmentation.made import scene
from tests.downstream.tiny import build, export_tiny
from tests.ranks import run_two_ranks
from tests.runs import SWIN, VIT

SIZE = 16
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"head": "linear"},
    "linear-all": {"head": "linear", "maps": "all"},
    "upernet": {"channels": 16, "auxiliary_channels": 16, "dropout": 0.0},
    "upernet-group": {"channels": 16, "auxiliary_channels": 16, "dropout": 0.0, "norm": "group"},
}


def segmenter(family: str, head: str, channels: int = 1, **more: Any) -> Segmenter:
    spec, any_size = {"vit": (VIT, {"dynamic_img_size": True}), "swin": (SWIN, {"strict_img_size": False})}[family]
    torch.manual_seed(1)
    encoder = timm.create_model(
        spec["name"], num_classes=0, in_chans=channels, img_size=SIZE, drop_path_rate=0.0, **spec["args"], **any_size
    )
    cfg = SegmentationModel.model_validate(HEADS[head])
    mean, std = [0.4] * channels, [0.3] * channels
    return Segmenter(encoder, mean, std, ["a", "b", "c"], cfg, **more)


def batch(count: int, channels: int = 1, size: int = SIZE) -> tuple[Tensor, Tensor]:
    pairs = [scene(i, height=size, width=size) for i in range(count)]
    images = torch.stack([torch.from_numpy(image)[None] for image, _ in pairs]).expand(-1, channels, -1, -1)
    return images, torch.stack([torch.from_numpy(mask).short() for _, mask in pairs])


def gradients(model: torch.nn.Module, images: Tensor, targets: Tensor, parts: int = 1) -> dict[str, Tensor]:
    for some, truth in zip(images.chunk(parts), targets.chunk(parts), strict=True):
        (sum(model(some, truth).values()) / parts).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ignored_here_and_there() -> tuple[Tensor, Tensor]:
    """The first half of the batch is mostly ignored: dividing by labelled pixels would weigh it otherwise."""
    images, targets = batch(4)
    targets[:2, 3:] = IGNORED
    return images, targets


def half_of_the_gradients(cases: list[str]) -> dict[str, dict[str, Tensor]]:
    images, targets = ignored_here_and_there()
    rank, out = torch.distributed.get_rank(), {}
    for case in cases:
        model = DistributedDataParallel(segmenter(*case.split()).double().train())
        mine = slice(2 * rank, 2 * rank + 2)
        found = gradients(model, images[mine], targets[mine])
        out[case] = {name.removeprefix("module."): g for name, g in found.items()}
        out[case] |= {f"buffer {name}": buffer for name, buffer in model.module.named_buffers()}
    return out


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_weights_of_an_export_are_bit_equal_in_the_model(tmp_path: Path, family: str, head: str) -> None:
    from hybrid_ssl.downstream.segmentation import SegmentationTask
    from tests.downstream.segmentation.made import make_folders, make_recipe

    export = export_tiny(tmp_path / "encoder", family, channels=1, size=SIZE)
    data = make_folders(tmp_path / "data", 4, 2)
    stored = load_file(export / "model.safetensors")
    inside = SegmentationTask(make_recipe(data, export, model=HEADS[head])).model.state_dict()
    assert stored and all(torch.equal(inside[f"encoder.{name}"], tensor) for name, tensor in stored.items())
    random = SegmentationTask(make_recipe(data, export, encoder={"name": str(export), "random": True})).model
    weights = [name for name, tensor in stored.items() if tensor.ndim > 1 and tensor.std() > 0]
    assert weights and not any(torch.equal(random.state_dict()[f"encoder.{name}"], stored[name]) for name in weights)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("head", list(HEADS))
def test_twenty_steps_lower_the_loss_and_reach_every_parameter(family: str, head: str) -> None:
    model = segmenter(family, head).train()
    images, targets = batch(8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_linear_head_reads_all_maps_at_the_finest_ones_size(family: str) -> None:
    model = segmenter(family, "linear-all", window=None).double().train()
    taps = model.taps
    maps = [
        torch.randn(2, d, 16 // s, 16 // s, dtype=torch.float64)
        for d, s in zip(taps.channels, taps.strides, strict=True)
    ]
    fine = [nn.functional.interpolate(m, size=maps[0].shape[-2:], mode="bilinear") for m in maps]
    rows = torch.cat(fine, dim=1).movedim(1, -1)  # [B, h, w, sum of D]
    normed = (rows - rows.mean((0, 1, 2))) / (rows.var((0, 1, 2), correction=0) + 1e-5).sqrt()
    expected = normed @ model.head.classify.weight.flatten(1).T
    torch.testing.assert_close(model.head(maps).movedim(1, -1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_any_channels_and_sizes_give_a_class_for_every_pixel(family: str, channels: int) -> None:
    model = segmenter(family, "upernet", channels).eval()
    for size in ((16, 16), (16, 24), (19, 35)):
        (found,) = model([torch.zeros(channels, *size, dtype=torch.uint8)])
        assert found.shape == size and 0 <= int(found.min()) <= int(found.max()) < 3


def test_loss_is_the_sum_over_labelled_pixels_by_all_pixels() -> None:
    scores = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    targets = torch.randint(-1, 3, (2, 4, 4))
    known = targets != IGNORED
    logs = scores.log_softmax(1).permute(0, 2, 3, 1)[known]
    expected = -logs[torch.arange(len(logs)), targets[known]].sum() / targets.numel()
    assert torch.allclose(pixel_loss(scores, targets), expected)
    assert pixel_loss(scores, torch.full_like(targets, IGNORED)) == 0


def test_two_processes_and_two_micro_batches_have_the_gradients_of_one_batch() -> None:
    images, targets = ignored_here_and_there()
    ranks = run_two_ranks(half_of_the_gradients, ["vit linear", "vit upernet-group", "swin upernet"])
    for case in ranks[0]:
        family, head = case.split()
        model = segmenter(family, head).double().train()
        whole = gradients(model, images, targets)
        whole |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
        for rank in ranks:
            assert rank[case].keys() == whole.keys()
            wrong = [n for n, g in whole.items() if not torch.allclose(rank[case][n], g, rtol=1e-9, atol=1e-12)]
            assert not wrong, (case, wrong)
        if head == "upernet-group":  # nothing depends on the division
            parts = gradients(segmenter(family, head).double().train(), images, targets, parts=2)
            assert all(torch.allclose(parts[n], whole[n], rtol=1e-9, atol=1e-12) for n in parts)


def test_sliding_with_one_window_equals_the_whole_image() -> None:
    images, _ = batch(2)
    whole, slid = segmenter("vit", "upernet").eval(), segmenter("vit", "upernet", window=(16, 16), stride=(8, 8)).eval()
    assert torch.equal(whole.scores(images), slid.scores(images))
    wide = batch(1, size=32)[0]
    assert not torch.equal(whole.scores(wide), slid.scores(wide)) and slid.scores(wide).shape[-2:] == (32, 32)


def test_short_side_resizes_before_and_after() -> None:
    model = segmenter("vit", "linear", short_side=16).eval()
    images = torch.randint(0, 255, (1, 1, 32, 48), dtype=torch.uint8)
    found = model.scores(images)
    assert found.shape[-2:] == (32, 48)
    small = torch.nn.functional.interpolate(model.normalise(images), size=(16, 24), mode="bilinear", antialias=True)
    again = torch.nn.functional.interpolate(model._upsampled(small), size=(32, 48), mode="bilinear")
    assert torch.allclose(found, again)


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_a_vits_maps_become_strides_4_8_16_32(patch: int) -> None:
    levels = Levels(Taps((0, 1, 2, 3), (16,) * 4, (patch,) * 4), "group")
    maps = levels([torch.randn(1, 16, 8, 8)] * 4)
    up = {4: 0, 8: 1, 14: 2, 16: 2, 32: 3}[patch]
    assert [m.shape[-1] for m in maps] == [max(1, -(-8 * 2**up // 2**i)) for i in range(4)]


def test_a_swins_stages_are_normed_but_the_last() -> None:
    encoder = build("swin", 1, SIZE)
    head = UPerHead(taps_of(encoder), SegmentationModel(channels=16), 3)
    assert [type(level).__name__ for level in head.levels] == ["LayerNorm2d", "Identity"]


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_stored_configuration_gives_the_same_predictions(tmp_path: Path, family: str) -> None:
    from hybrid_ssl.downstream.segmentation import SegmentationTask
    from tests.downstream.segmentation.made import make_folders, make_recipe

    export = export_tiny(tmp_path / "encoder", family, channels=1, size=SIZE)
    recipe = make_recipe(make_folders(tmp_path / "data", 4, 2), export, test={"mode": "slide", "crop": 16, "stride": 8})
    task = SegmentationTask(recipe)
    again = restore(json.loads(json.dumps(task.config())))
    again.load_state_dict(task.model.state_dict(), strict=True)
    image = torch.randint(0, 255, (1, 21, 30), dtype=torch.uint8)
    mine, theirs = task.model.eval().predict(image), again.predict(image)
    assert torch.equal(mine["labels"], theirs["labels"]) and mine["labels"].shape == (21, 30)
    assert sum(theirs["share"].values()) == pytest.approx(1) and theirs["share"].keys() <= set(task.classes)
    assert again.draw(image, theirs).shape == (3, 21, 30) and again.classes == task.classes


def test_half_precision_keeps_the_loss_in_float32() -> None:
    model = segmenter("vit", "upernet").train()
    images, targets = batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert all(value.isfinite() for value in losses.values())
