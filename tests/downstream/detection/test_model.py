"""Detectors around exported encoders: the weights are the encoder's, all kinds learn, none waits for a gradient."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random

import pytest
import timm
import torch
from safetensors.torch import load_file

from hybrid_ssl.downstream.detection import DetectionTask, restore
from hybrid_ssl.downstream.detection.heads import RoiPool
from hybrid_ssl.downstream.detection.model import Canvas, Detector, paste
from hybrid_ssl.downstream.detection.settings import DetectionModel
from hybrid_ssl.downstream.encoders import Normalise, taps_of
from tests.downstream.detection.made import SMALL, make_coco, make_recipe
from tests.downstream.tiny import export_tiny

KINDS = ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"]
FAMILIES = ["vit", "swin"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"), train=8, test=4)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {family: export_tiny(root / family, family, channels=1, size=32) for family in FAMILIES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoders_weights_are_those_of_the_export(
    data: Path, encoders: dict[str, Path], family: str, kind: str
) -> None:
    model = DetectionTask(make_recipe(data, encoders[family], kind)).model
    stored = load_file(encoders[family] / "model.safetensors")
    own = {name.removeprefix("encoder."): t for name, t in model.state_dict().items() if name.startswith("encoder.")}
    assert own.keys() >= stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in stored)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert not [name for name in names if "backbone" in name]  # registered once
    assert torch.equal(model.detector.transform.normalise.mean.flatten(), torch.tensor([0.3]))  # no ImageNet


def test_random_weights_are_asked_for_by_name(data: Path, encoders: dict[str, Path]) -> None:
    recipe = make_recipe(data, encoders["vit"], encoder={"random": True}, run={"seed": 5})
    name, weight = next((n, p) for n, p in DetectionTask(recipe).model.encoder.named_parameters() if "qkv.weight" in n)
    assert not torch.equal(weight, load_file(encoders["vit"] / "model.safetensors")[name])
    other = DetectionTask(recipe).model.encoder.get_parameter(name)
    assert torch.equal(weight, other)  # of the seed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_learns_and_every_parameter_has_a_gradient(
    data: Path, encoders: dict[str, Path], family: str, kind: str
) -> None:
    task = DetectionTask(make_recipe(data, encoders[family], kind))
    model = task.model.train()
    images, targets = task.collate([task.train.read(i, Random(i)) for i in range(4)])
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([parameter for _, parameter in trained], lr=1e-3)
    totals = []
    for step in range(30):
        torch.manual_seed(0)  # the same anchors are sampled
        losses = model(images, targets)
        total = torch.stack(list(losses.values())).sum()
        assert total.dtype == torch.float32 and total.isfinite()
        optimizer.zero_grad()
        total.backward()
        if step == 0:
            assert not [name for name, parameter in trained if parameter.grad is None]
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.9 * totals[0], totals
    empty = [{name: value[:0] for name, value in target.items()} for target in targets]
    optimizer.zero_grad()
    torch.stack(list(model(images, empty).values())).sum().backward()
    assert not [name for name, parameter in trained if parameter.grad is None]  # nor without any box
    assert all(parameter.grad.isfinite().all() for _, parameter in trained if parameter.grad is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_boxes_are_float32_under_autocast(data: Path, encoders: dict[str, Path], kind: str) -> None:
    task = DetectionTask(make_recipe(data, encoders["vit"], kind, model={"score": 0.0}))
    images, targets = task.collate([task.train.read(i, Random(i)) for i in range(2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task.model.train()(images, targets)
        assert {loss.dtype for loss in losses.values()} == {torch.float32}
        torch.stack(list(losses.values())).sum().backward()
        found = task.model.eval()(images)
    assert found[0]["boxes"].dtype == torch.float32 and len(found[0]["boxes"])


@pytest.mark.parametrize("kind", ["mask_rcnn", "fcos"])
def test_a_stored_detector_is_built_again_and_a_copy_is_independent(
    data: Path, encoders: dict[str, Path], kind: str
) -> None:
    task = DetectionTask(make_recipe(data, encoders["swin"], kind, model={"score": 0.0}))
    model = task.model.eval()
    config = json.loads(json.dumps(task.config()))
    with torch.inference_mode():  # as people do who only predict
        predicting = restore(config)
        predicting.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        again = restore(config)
    again.load_state_dict(model.state_dict(), strict=True)
    twin = copy.deepcopy(model)
    image = task.test.read(0, None)[0]
    wanted = model.predict(image)
    for other in (again.eval(), predicting.eval(), twin):
        found = other.predict(image)
        assert torch.equal(found["boxes"], wanted["boxes"]) and found["names"] == wanted["names"]
    with torch.no_grad():
        twin.encoder.norm.weight.zero_()
    assert not torch.equal(twin.predict(image)["scores"], wanted["scores"])  # the copy reads its own encoder
    assert torch.equal(model.predict(image)["scores"], wanted["scores"])


def test_predictions_do_not_depend_on_the_rest_of_the_batch_and_fit_the_image(
    data: Path, encoders: dict[str, Path]
) -> None:
    task = DetectionTask(make_recipe(data, encoders["vit"], model={"score": 0.0, "size": 48}))
    model = task.model.eval()
    wide = torch.randint(0, 256, (1, 40, 100), dtype=torch.uint8)
    small = torch.randint(0, 256, (1, 20, 13), dtype=torch.uint8)
    with torch.no_grad():
        together, alone = model([wide, small]), model([small])
    assert torch.allclose(together[1]["boxes"], alone[0]["boxes"], atol=1e-3)
    assert torch.allclose(together[1]["scores"], alone[0]["scores"], atol=1e-5)
    for image, found in ((wide, together[0]), (small, together[1])):
        limit = torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3
        assert len(found["boxes"]) and (found["boxes"] >= 0).all() and (found["boxes"] <= limit).all()
    found = model.predict(wide)
    assert found["masks"].shape == (len(found["boxes"]), 40, 100) and found["masks"].dtype == torch.bool
    assert model.draw(wide, found, least=0.0).shape[0] == 3


def test_of_boxes_that_overlap_the_surest_is_drawn(data: Path, encoders: dict[str, Path]) -> None:
    model = DetectionTask(make_recipe(data, encoders["vit"], "faster_rcnn")).model
    image = torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 2, 20, 20], [3.0, 3, 21, 20], [22.0, 22, 31, 31], [0.0, 20, 9, 30]])
    found = {"boxes": boxes, "labels": torch.tensor([0, 1, 0, 1]), "scores": torch.tensor([0.4, 0.8, 0.6, 0.3])}
    seen = {name: value[[1, 2]] for name, value in found.items()}
    assert torch.equal(model.draw(image, found), model.draw(image, seen, least=0.0))
    model.drawn = 0.2
    assert torch.equal(model.draw(image, found), model.draw(image, {name: v[1:] for name, v in found.items()}, 0.0))
    assert not torch.equal(model.draw(image, found), model.draw(image, seen))
    nothing = {name: value[:0] for name, value in found.items()}
    assert model.draw(image, nothing).shape == model.draw(image, found).shape


def test_images_are_resized_once_normalised_and_padded_with_the_mean() -> None:
    canvas = Canvas(Normalise([0.5], [0.25]), 32, 48).eval()
    bright = torch.full((1, 64, 16), 255, dtype=torch.uint8)
    page, _ = canvas([bright])
    assert page.image_sizes == [(32, 8)] and page.tensors.shape == (1, 1, 48, 48)
    assert (page.tensors[0, 0, :32, :8] == 2).all() and page.tensors[0, 0].sum() == 2 * 32 * 8
    page, _ = canvas.train()([bright[:, :30]])  # training images come as they shall be
    assert page.image_sizes == [(30, 16)]


def test_pasted_masks_lie_where_their_pixels_were() -> None:
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    truth = (((x - 30.5) / 17) ** 2 + ((y - 25.5) / 11) ** 2 <= 1).float()
    box = torch.tensor([[13.0, 14, 49, 38]])
    pooled = RoiPool(1, 28, 64)({"0": truth[None, None]}, [box], [(64, 64)])[:, 0]
    again = paste(pooled, box, (64, 64))[0]
    overlap = (again & truth.bool()).sum() / (again | truth.bool()).sum()
    assert overlap > 0.97, overlap


def test_parameters_that_no_map_reads_are_not_trained() -> None:
    args = {"embed_dim": 16, "depth": 1, "num_heads": 1, "img_size": 32, "num_classes": 0, "patch_size": 8}
    encoder = timm.create_model("vit_tiny_patch16_224", global_pool="avg", fc_norm=True, **args)
    cfg = DetectionModel.model_validate(SMALL)
    Detector(encoder, taps_of(encoder), [0.5] * 3, [0.5] * 3, ["a"], cfg)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"fc_norm.weight", "fc_norm.bias"}  # of pooled features
