"""Files that need fitting, files that do not fit, and files that are dangerous."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from hybrid_ssl.encoder import EncoderSettings, build_encoder, load_frozen
from hybrid_ssl.encoder.official import read_weights
from hybrid_ssl.hub.load import load_encoder
from tests.encoder.official.reference import DEPTH, DIM, HEADS, State, random_state, vit, vit_shapes
from tests.encoder.official.test_vits import SMALL, assert_equal, double, images, load, save
from tests.runs import pretrain, recipe_data, write_recipe
from tests.tiny_encoder import shared_start

NAME = "vit_tiny_patch16_224"


def cubic(values: Tensor, size: int) -> Tensor:
    """Keys' resampling (a = -0.5), which blurs when it shrinks, as antialiasing does: [h, ...] -> [size, ...]."""
    old = values.shape[0]
    scale = max(1.0, old / size)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * old / size - 0.5
    away = (torch.arange(old, dtype=torch.float64)[None] - centre[:, None]).abs() / scale
    near = 1.5 * away**3 - 2.5 * away**2 + 1
    far = -0.5 * away**3 + 2.5 * away**2 - 4 * away + 2
    weight = torch.where(away < 1, near, torch.where(away < 2, far, 0.0))
    return torch.tensordot(weight / weight.sum(1, keepdim=True), values, dims=1)


@pytest.mark.parametrize("size", [8, 24])
def test_positions_are_resampled_and_the_class_token_keeps_its_own(size: int, tmp_path: Path) -> None:
    state = random_state(vit_shapes(), 1)
    encoder = load(save(tmp_path, state), size=size)
    grid = state["pos_embed"][0, 1:].double().unflatten(0, (4, 4))  # [h, w, D]
    resampled = cubic(cubic(grid, size // 4).transpose(0, 1), size // 4).transpose(0, 1).flatten(0, 1)
    direct = double(state) | {"pos_embed": torch.cat([state["pos_embed"][:, :1].double(), resampled[None]], 1)}
    assert_equal(encoder, vit(direct, images(size)), size=size, tolerance=2e-6)  # timm resamples in float32
    assert f"positions 4 x 4 resampled to {size // 4} x {size // 4}" in encoder.origin[1]


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_stem_takes_other_channels(channels: int, tmp_path: Path) -> None:
    """An image with one picture in all channels gives what the same picture in three channels gives."""
    state = random_state(vit_shapes(), 1)
    if channels != 1:  # repeated in order, so 4 and 13 are no whole multiples: equal channels make it exact
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :1].expand(-1, 3, -1, -1).clone()
    encoder = load(save(tmp_path, state), channels=channels)
    gray = images()[:, :1]
    tokens = encoder.model.forward_features(gray.expand(-1, channels, -1, -1))
    expected = vit(double(state), gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert f"stem from 3 to {channels} channels" in encoder.origin[1] and len(encoder.mean_std[0]) == channels


def test_patches_of_another_size_see_enlarged_images_alike(tmp_path: Path) -> None:
    state = random_state(vit_shapes(), 1)
    encoder = load(save(tmp_path, state), size=32, args=SMALL | {"patch_size": 8})
    large = torch.nn.functional.interpolate(images(), scale_factor=2, mode="bicubic", antialias=True)
    small = torch.nn.functional.conv2d(images(), double(state)["patch_embed.proj.weight"], stride=4)
    found = torch.nn.functional.conv2d(large, encoder.model.patch_embed.proj.weight, stride=8)
    likeness = torch.nn.functional.cosine_similarity(small.flatten(1), found.flatten(1))
    assert (likeness > 0.9).all()  # at their edges patches see a little of their neighbours
    assert "patches 4 x 4 resampled to 8 x 8" in encoder.origin[1]


MISFITS: list[tuple[str, dict[str, Any], str]] = [
    ("blocks.1.mlp.fc2.bias", {}, "missing in the file: blocks"),
    ("pos_embed", {}, "missing in the file: pos_embed"),
    ("patch_embed.proj.bias", {}, r"missing in the file: patch_embed.proj. Choose"),
    ("", {"embed_dim": 36}, "holds a ViT of width 24, 2 blocks.*the encoder is a ViT of width 36"),
    ("", {"depth": 1}, "2 blocks and patches of 4 pixels, the encoder is a ViT of width 24, 1 blocks"),
    ("", {"mlp_ratio": 2}, r"other shapes: blocks.0.mlp.fc1.weight \(96, 24\), the encoder's \(48, 24\).*and 3 more"),
    ("", {"class_token": False, "global_pool": "avg"}, "without a place in the encoder: cls_token.*set or remove"),
    ("", {"init_values": 0.1}, "missing in the file: blocks.*encoder.args, such as .*init_values"),
    ("", {"reg_tokens": 2}, "missing in the file: reg_token"),
]


@pytest.mark.parametrize(("left_out", "args", "message"), MISFITS)
def test_what_does_not_fit_is_named(left_out: str, args: dict[str, Any], message: str, tmp_path: Path) -> None:
    state = random_state(vit_shapes(), 1)
    state.pop(left_out, None)
    with pytest.raises(ValueError, match=f"(?s)checkpoint.pth.*{message}"):
        load(save(tmp_path, state), args=SMALL | args)


def test_convolutional_stem_and_unknown_layouts_are_refused(tmp_path: Path) -> None:
    state = random_state(vit_shapes(), 1)
    stem = {"patch_embed.proj.0.weight": torch.zeros(8, 3, 3, 3)}
    without = {name: tensor for name, tensor in state.items() if not name.startswith("patch_embed")}
    with pytest.raises(ValueError, match="without a place in the encoder: patch_embed"):
        load(save(tmp_path, without | stem))
    with pytest.raises(ValueError, match=r"no encoder in a known layout; it begins with conv1.weight.*MAE, SimMIM"):
        load(save(tmp_path, {"conv1.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load(save(tmp_path, [1, 2]))


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_file_that_would_run_code_is_refused_and_runs_nothing(legacy: bool, tmp_path: Path) -> None:
    content = {"model": random_state(vit_shapes(), 1), "args": Evil(tmp_path / "trace")}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"objects of other programs \((posix|nt).mkdir\).*docs/weights.md"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "trace").exists()  # it would have


def test_logs_of_numbers_are_not_needed_and_numpy_is_not_asked(tmp_path: Path) -> None:
    state = random_state(vit_shapes(), 1)
    logs = {"history": np.zeros(3), "best": np.float64(3.0), "kind": np.dtype("float32")}
    weights = read_weights(save(tmp_path, {"state_dict": state, "message_hub": logs}))
    assert weights.tensors.keys() == state.keys()


def test_broken_and_missing_files_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 no more")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "cut.safetensors").write_bytes(b"\x09")
    for name in ("broken.pth", "text.pth", "cut.safetensors"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    with pytest.raises(ValueError, match="checkpoint file .*nothing.pth' does not exist"):
        load(tmp_path / "nothing.pth")


def test_same_words_everywhere(tmp_path: Path) -> None:
    """Recipes, frozen encoders and load_encoder take the file by the same function."""
    state = random_state(vit_shapes(patch=16, grid=2), 1)
    file = save(tmp_path, state)
    loaded = load_encoder(NAME, init=file, size=32, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    own = load(file, size=32, args=SMALL | {"patch_size": 16}).float()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, own.model.state_dict()[name])
    classifier = load_encoder(NAME, init=file, size=32, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=5)
    assert classifier(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    full = save(tmp_path, timm.create_model(NAME, num_classes=0, img_size=32).state_dict(), "full.pth")
    assert load_frozen(str(full), name=NAME, in_chans=3, size=(32, 32)).mean_std[0] == [0.485, 0.456, 0.406]
    with pytest.raises(ValueError, match="is a file of weights: say which timm model"):
        load_frozen(str(full), in_chans=3, size=(32, 32))
    with pytest.raises(ValueError, match=r"is a file of weights: load_encoder\('vit_base"):
        load_encoder(full)


def test_other_architecture_than_the_name_is_refused(tmp_path: Path) -> None:
    def build(**settings: Any) -> None:
        build_encoder(EncoderSettings(name="vit_base_patch16_224", **settings), in_chans=3, sizes={"v": (32, 32)})

    with pytest.raises(
        ValueError, match="holds a vit_small_patch16_224, not a vit_base_patch16_224: set encoder.name="
    ):
        build(init="vit_small_patch16_224.dino")
    with pytest.raises(ValueError, match="init_part chooses an encoder of a checkpoint file"):
        build(init_part="teacher")


def test_run_folder_is_taken_for_its_newest_export_if_it_is_of_the_kind() -> None:
    export = Path(shared_start(NAME, "embed_dim=24", "depth=1", "num_heads=3"))
    cfg = EncoderSettings(name=NAME, init=str(export.parent))
    encoder = build_encoder(cfg, in_chans=3, sizes={"v": (32, 32)})
    saved = load_file(export / "model.safetensors")["blocks.0.attn.qkv.weight"]
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, saved) and "local-dir:" in encoder.origin[0]
    with pytest.raises(ValueError, match="holds a vit_tiny_patch16_224, not a vit_small_.*: set encoder.name="):
        other = EncoderSettings(name="vit_small_patch16_224", init=str(export.parent))
        build_encoder(other, in_chans=3, sizes={"v": (32, 32)})


def test_run_says_what_was_done_and_ends_with_2_when_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "patch_size": 4}
    state: State = random_state(vit_shapes(), 1)
    file = save(tmp_path, {"model": state | {"decoder_blocks.0.norm1.weight": torch.zeros(3)}})
    recipe = write_recipe(tmp_path, recipe_data(tmp_path / "out", encoder={"args": args, "init": str(file)}))
    assert pretrain("--dry-run", recipe) == 0
    out = capsys.readouterr().out
    assert "weights: checkpoint.pth (MAE): all 30 tensors of the encoder found" in out
    assert "  changed: stem from 3 to 1 channels" in out and "  ignored: decoder_blocks" in out
    del state["blocks.0.norm1.bias"]
    save(tmp_path, state)
    assert pretrain("--dry-run", recipe) == 2
    assert "missing in the file: blocks" in capsys.readouterr().err
