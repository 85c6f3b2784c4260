"""A tokenizer is trained from the command line, repeats its bits, and tells the truth about its codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hybrid_ssl.cli import main
from hybrid_ssl.data.settings import DataSettings, ViewSettings
from hybrid_ssl.tokenizer.files import load_tokenizer
from hybrid_ssl.tokenizer.train import TrainingSettings, measure, perplexity, train_tokenizer
from hybrid_ssl.tokenizer.vq import VQ, VQSettings


def settings(out: Path, **changes: object) -> TrainingSettings:
    data = DataSettings(source="embedded:fashion_mnist", channels=1, limit=64)
    model = VQSettings(channels=1, stride=4, codes=16, dim=4, width=4)
    view = ViewSettings(size=16, scale=[0.5, 1.0])
    more = {"steps": 5, "batch_size": 8, "log_every": 2, "workers": 0, "device": "cpu", **changes}
    return TrainingSettings.model_validate({"data": data, "model": model, "view": view, "out": str(out), **more})


def test_training_prints_measures_and_writes_a_folder_that_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    measures = train_tokenizer(settings(tmp_path / "t"), lines.append)
    tokenizer, digest = load_tokenizer(tmp_path / "t")
    assert digest == measures["sha256"] and isinstance(tokenizer, VQ)
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["step 2/5", "step 4/5", "step 5/5"]
    assert all(word in lines[1] for word in ("perplexity", "used codes", "PSNR", "dB"))
    log = [json.loads(line) for line in (tmp_path / "t" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and 1 <= log[-1]["perplexity"] <= log[-1]["used_codes"] <= 16
    with Image.open(tmp_path / "t" / "reconstruction.png") as picture:
        assert picture.width > 100
    assert json.loads((tmp_path / "t" / "config.json").read_text())["training"]["steps"] == 5


def test_the_same_settings_give_the_same_bits(tmp_path: Path) -> None:
    hashes = [train_tokenizer(settings(tmp_path / name), lambda line: None)["sha256"] for name in ("a", "b")]
    other = train_tokenizer(settings(tmp_path / "c", seed=1), lambda line: None)["sha256"]
    assert hashes[0] == hashes[1] != other


@pytest.mark.parametrize("kind", ["vq", "dvae"])
def test_command_line_trains_either_kind(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--channels 1 --size 8 --stride 4 --codes 8 --dim 4 --width 4 --batch-size 4 --steps 2 --workers 0"
    command = f"tokenizer --source embedded:fashion_mnist --kind {kind} {small} --device cpu --out {tmp_path / 't'}"
    assert main(command.split()) == 0
    assert "written to" in capsys.readouterr().out and load_tokenizer(tmp_path / "t")[0].kind == kind


def test_what_does_not_fit_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"tokenizer --source embedded:fashion_mnist --size 30 --stride 4 --out {tmp_path / 't'}"
    assert main(command.split()) == 2
    assert "pictures of 30 x 30 pixels have no whole number of squares of 4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="tokenizer has 1 channels, the pictures have 3"):
        train_tokenizer(settings(tmp_path).model_copy(update={"data": DataSettings(source="nowhere")}))
    with pytest.raises(ValueError, match="view.crops is 2, set it to 1"):
        train_tokenizer(settings(tmp_path).model_copy(update={"view": ViewSettings(size=16, crops=2)}))


def test_perplexity_counts_codes_in_use() -> None:
    assert perplexity(torch.tensor([5.0, 5.0, 0.0, 5.0, 5.0])) == pytest.approx(4)
    assert perplexity(torch.tensor([9.0, 0.0])) == pytest.approx(1)
    assert perplexity(torch.zeros(3)) == pytest.approx(1)


def test_psnr_is_that_of_the_pictures_from_their_ids() -> None:
    tokenizer = VQ(VQSettings(channels=1, stride=4, codes=8, dim=4, width=4)).eval()
    images = torch.rand(2, 1, 8, 8)
    error = (tokenizer.decode(tokenizer.ids(images), (2, 2)) - images).square().mean()
    found = measure(tokenizer, images, torch.tensor([1.0, 0.0, 2.0]))
    assert found["psnr"] == pytest.approx(-10 * error.log10().item(), rel=1e-5) and found["used_codes"] == 2
