"""Densities and scores against definitions, and planted defects found in folders of pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from hybrid_ssl.anomaly import Detector, auroc, find_anomalies, fit_gaussian, paint
from hybrid_ssl.cli import main
from hybrid_ssl.data.sources import open_named
from hybrid_ssl.hub.export import export_encoder
from hybrid_ssl.hub.facts import CardFacts

SIDE = 64


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def texture(seed: int) -> Tensor:
    """Diagonal stripes with noise: uint8 [3, SIDE, SIDE]."""
    draw = torch.Generator().manual_seed(seed)
    phase = torch.rand(1, generator=draw) * 6.28
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    stripes = 128 + 70 * torch.sin((rows + columns) / 3 + phase)
    return (stripes + 12 * torch.randn(3, SIDE, SIDE, generator=draw)).clamp(0, 255).to(torch.uint8)


def spoil(picture: Tensor, seed: int) -> tuple[Tensor, int, int]:
    """A 20-pixel square of stripes in the other direction, and where."""
    top, left = (
        int(torch.randint(4, SIDE - 24, (1,), generator=torch.Generator().manual_seed(seed + k))) for k in (0, 1)
    )
    out = picture.clone()
    out[:, top : top + 20, left : left + 20] = picture.flip(2)[:, top : top + 20, left : left + 20]
    return out, top + 10, left + 10


def save(picture: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights, 40 good pictures, and a test folder of 15 good and 15 spoiled ones."""
    root = tmp_path_factory.mktemp("anomaly")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=SIDE, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    half = [0.5] * 3
    export_encoder(
        model, root / "encoder", input_size=(3, SIDE, SIDE), mean=half, std=half, card=CardFacts(), verify=False
    )
    for i in range(40):
        save(texture(i), root / "good" / f"{i:02}.png")
    for i in range(15):
        save(texture(100 + i), root / "test" / "good" / f"{i:02}.png")
        save(spoil(texture(200 + i), i)[0], root / "test" / "cut" / f"{i:02}.png")
    return root


def test_density_equals_the_definition_when_shrinkage_is_given() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    fitted = fit_gaussian(x)
    rows = unit(x)
    covariance = torch.zeros(6, 6, dtype=torch.float64)
    for row in rows:
        covariance += torch.outer(row - rows.mean(0), row - rows.mean(0)) / 50
    sphere = covariance.trace() / 6 * torch.eye(6, dtype=torch.float64)
    noise = (
        sum((torch.outer(row - rows.mean(0), row - rows.mean(0)) - covariance).square().sum() for row in rows) / 50**2
    )
    shrinkage = noise / (covariance - sphere).square().sum()  # Ledoit and Wolf, lemma 3.3 and 3.4
    assert 0 < shrinkage < 1 and fitted.shrinkage == pytest.approx(float(shrinkage), rel=1e-9)
    inverse = torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * sphere)
    queries = torch.randn(4, 6, dtype=torch.float64)
    off = unit(queries) - rows.mean(0)
    torch.testing.assert_close(fitted.distance(queries), (off @ inverse * off).sum(1).sqrt())


def test_fewer_pictures_than_features_still_give_a_density() -> None:
    fitted = fit_gaussian(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)))
    assert 0.5 < fitted.shrinkage <= 1 and fitted.distance(torch.randn(3, 64)).isfinite().all()
    scaled = fitted.distance(torch.ones(1, 64))
    assert torch.equal(fitted.distance(5 * torch.ones(1, 64)), scaled)  # length of a feature does not count
    with pytest.raises(ValueError, match="3 pictures with equal features"):
        fit_gaussian(torch.ones(3, 8))


def test_auroc_counts_pairs_with_half_of_the_ties() -> None:
    scores = torch.tensor([1.0, 2, 2, 3, 3, 3, 0])
    positive = torch.tensor([False, True, False, True, False, True, False])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive].tolist() for n in scores[~positive].tolist()]
    assert auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(positive.float(), positive) == 1
    assert math.isnan(auroc(scores, torch.ones(7, dtype=torch.bool)))


def test_planted_defects_are_found(folder: Path) -> None:
    out = folder / "out"
    assert main(["anomaly", *(str(folder / name) for name in ("encoder", "good", "test")), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["auroc"] > 0.65  # the encoder is random; chance is 0.5
    assert summary["images"] == 30 and summary["fitted_on"] == 40
    lines = (out / "scores.csv").read_text().splitlines()
    assert len(lines) == 31 and lines[1].split(",")[0].endswith("cut/00.png")
    assert Image.open(out / "heat.png").width > 300


def test_heat_is_where_the_defect_is(folder: Path) -> None:
    detector = Detector(folder / "encoder")
    detector.fit(open_named(str(folder / "good")))
    score = detector.score(open_named(str(folder / "test" / "cut")))
    assert score.maps is not None
    heat = detector.heat(score.maps)
    assert heat.shape == (15, SIDE, SIDE)
    near = 0
    for i, each in enumerate(heat):
        _, row, column = spoil(texture(200 + i), i)
        hottest = divmod(int(each.argmax()), SIDE)
        near += math.dist(hottest, (row, column)) < 14
    assert near >= 12


def test_painting_leaves_normal_places_gray() -> None:
    picture = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    heat = torch.zeros(1, 4, 4)
    heat[0, 1, 2] = 5
    painted = paint(picture, heat, low=1, high=5)
    assert painted[0, :, 1, 2].tolist() == [196, 44, 44]
    assert (painted[0, :, heat[0] == 0] == 100).all()


def test_folders_without_good_ones_are_explained(folder: Path) -> None:
    with pytest.raises(ValueError, match="has the folders cut, good: name the one of good pictures with --good-name"):
        find_anomalies(folder / "encoder", folder / "good", folder / "test", folder / "x", good_name="fine")
