"""Window attention: against attention computed square by square, and with nothing else changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

from hybrid_ssl.downstream.detection.model import Detector
from hybrid_ssl.downstream.detection.settings import DetectionModel
from hybrid_ssl.downstream.detection.windows import use_windows
from hybrid_ssl.downstream.encoders import dense_maps, taps_of
from tests.downstream.detection.made import SMALL

VIT: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "patch_size": 4, "img_size": 20, "num_classes": 0}


def vit(**args: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(VIT | {"depth": 8} | args)).double().eval()


def by_hand(model: Any, images: torch.Tensor, window: int) -> torch.Tensor:
    """The last map [B, D, 5, 5] of `vit`, with loops over images and windows."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for number, block in enumerate(model.blocks):
        normed = block.norm1(tokens)
        if number in (1, 3, 5, 7):  # the last block of each quarter of 8
            update = block.attn(normed)
        else:
            update = torch.zeros_like(tokens)
            first = tokens.shape[1] - 25
            for b in range(len(tokens)):
                for top in range(0, 5, window):
                    for left in range(0, 5, window):
                        square = torch.zeros(window, window, 16, dtype=torch.float64)
                        places = [(y, x) for y in range(window) for x in range(window) if top + y < 5 and left + x < 5]
                        for y, x in places:
                            square[y, x] = normed[b, first + (top + y) * 5 + left + x]
                        seen = block.attn(square.view(1, -1, 16)).view(window, window, 16)
                        for y, x in places:
                            update[b, first + (top + y) * 5 + left + x] = seen[y, x]
        tokens = tokens + update
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.norm(tokens)[:, -25:].transpose(1, 2).unflatten(2, (5, 5))


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("prefix", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_windows_are_those_of_loops_over_squares(window: int, prefix: dict[str, Any]) -> None:
    model, images = vit(**prefix), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    with torch.inference_mode():
        expected = by_hand(model, images, window)
        keys = list(model.state_dict())
        use_windows(model, taps_of(model), window)
        assert list(model.state_dict()) == keys
        for each in (model, copy.deepcopy(model)):
            torch.testing.assert_close(dense_maps(each, images, taps_of(each))[-1], expected, rtol=0, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, images = vit().train(), torch.randn(2, 3, 20, 20, dtype=torch.float64)
    use_windows(model, taps_of(model), 2)
    found = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        dense_maps(model, images, taps_of(model))[-1].square().sum().backward()
        found.append(model.blocks[0].attn.qkv.weight.grad.clone())
    assert found[0].abs().max() > 0 and torch.equal(*found)


def test_a_detector_with_windows_has_the_same_weights_and_other_features() -> None:
    read = {}
    for window in (None, 2):
        encoder = vit(img_size=32).float().train()
        cfg = DetectionModel.model_validate(SMALL | {"window": window})
        detector = Detector(encoder, taps_of(encoder), [0.5] * 3, [0.5] * 3, ["a", "b"], cfg)
        level = detector.maps(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))[0]
        level.square().sum().backward()
        assert not [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        read[window] = (level, detector.state_dict())
    assert read[None][1].keys() == read[2][1].keys()
    assert all(torch.equal(tensor, read[2][1][name]) for name, tensor in read[None][1].items())
    assert not torch.allclose(read[None][0], read[2][0])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}),
        ("eva02_tiny_patch14_224", {"depth": 4}),  # rotary positions belong to the whole grid
    ],
)
def test_a_swin_and_rotary_positions_are_refused(name: str, args: dict[str, Any]) -> None:
    model = timm.create_model(name, num_classes=0, **args)
    with pytest.raises(ValueError, match=r"model.window: \w+ is no plain ViT.*null"):
        use_windows(model, taps_of(model), 7)
