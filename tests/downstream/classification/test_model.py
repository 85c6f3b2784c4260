"""The classifier keeps the encoder bit for bit, begins with a quiet head, and comes back from its description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hybrid_ssl.downstream.classification.mix import soft
from hybrid_ssl.downstream.classification.model import Classifier, add_head, restore
from hybrid_ssl.downstream.classification.settings import HeadSettings
from hybrid_ssl.downstream.encoders import open_encoder
from hybrid_ssl.downstream.settings import FinetuneEncoder

CLASSES = ["a", "b", "c"]


def built(folder: Path, pool: Any = None, std: float = 2e-5, **encoder: Any) -> tuple[Classifier, dict[str, Any]]:
    opened = open_encoder(FinetuneEncoder(name=str(folder), **encoder), size=16, seed=0)
    model, again = add_head(opened, HeadSettings(pool=pool, std=std), 3, drop_path=0.0, seed=0)
    return Classifier(model, CLASSES, opened.mean, opened.std, (16, 16), 1.0), again


@pytest.mark.parametrize(("family", "pool"), [("vit", None), ("vit", "avg"), ("vit", "token"), ("swin", None)])
def test_encoder_arrives_bit_for_bit(encoders: dict[str, Path], family: str, pool: str | None) -> None:
    model, _ = built(encoders[family], pool)
    stored, found = load_file(encoders[family] / "model.safetensors"), model.encoder.state_dict()
    new = {name for name in found if name not in stored}
    assert all(name.startswith(("head.", "fc_norm.")) for name in new)
    lost = {"norm.weight", "norm.bias"} if pool == "avg" else set()
    assert stored.keys() - found.keys() == lost
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items() if name not in lost)


def test_average_pool_is_maes_mean_of_patches_with_a_new_norm(encoders: dict[str, Path]) -> None:
    model, _ = built(encoders["vit"], "avg", std=1.0)
    encoder: Any = model.eval().encoder
    images = torch.randint(0, 256, (2, 3, 16, 16)).byte()
    tokens = encoder.forward_features(model.normalise(images))[:, 1:]
    expected = F.layer_norm(tokens.mean(1), (16,), eps=encoder.fc_norm.eps) @ encoder.head.weight.T
    assert torch.allclose(model(images), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_new_head_has_the_asked_deviation_and_no_bias(encoders: dict[str, Path], family: str) -> None:
    for std in (2e-5, 0.01):
        head: Any = built(encoders[family], std=std)[0].encoder.get_classifier()  # type: ignore[operator]
        assert float(head.weight.detach().std()) == pytest.approx(std, rel=0.3) and not head.bias.any()


def test_loss_is_cross_entropy_with_soft_targets_of_normalised_images(encoders: dict[str, Path]) -> None:
    model, _ = built(encoders["vit"], std=1.0)
    images = torch.randint(0, 256, (4, 3, 16, 16)).byte()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]))
    targets = soft(torch.tensor([0, 1, 2, 0]), 3, 0.1)
    logits = model.encoder((images / 255 - mean) / std)
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(model(images, targets)["loss"], expected, atol=1e-6)
    assert torch.allclose(model.eval()(images), logits, atol=1e-6)


def test_random_weights_differ_from_the_stored_and_repeat(encoders: dict[str, Path]) -> None:
    trained, first, second = (built(encoders["swin"], random=r)[0].state_dict() for r in (False, True, True))
    name = "encoder.layers.0.blocks.0.mlp.fc1.weight"
    assert not torch.equal(trained[name], first[name])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_restored_classifier_answers_the_same(encoders: dict[str, Path], family: str) -> None:
    model, again = built(encoders[family], "avg" if family == "vit" else None, std=1.0)
    told = {"classes": CLASSES, "size": [16, 16], "crop": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3, "encoder": again}
    told["value_range"] = [0.0, 1.0]
    other = restore(told)
    assert other.value_range == (0.0, 1.0)
    other.load_state_dict(model.state_dict(), strict=True)
    image = torch.randint(0, 256, (3, 30, 21)).byte()
    found = other.eval().predict(image)
    assert found == model.eval().predict(image)
    assert found["label"] == CLASSES[found["class"]] and sum(p for _, p in found["top"]) == pytest.approx(1, abs=1e-4)
    drawn = other.draw(image, found)
    assert drawn.shape[0] == 3 and drawn.shape[2] == 21 and torch.equal(drawn[:, :30], image)


def test_pools_that_do_not_exist_are_refused(encoders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="head.pool: SwinTransformer has no class token"):
        built(encoders["swin"], "token")
