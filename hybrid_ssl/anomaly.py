"""Find what is not normal: a Gaussian around the features of good pictures, and the distance of others from it.

After CutPaste (Li et al., arXiv 2104.04015, section 2.2): features of a frozen encoder, brought to unit length; the
log-density under one Gaussian is, up to constants, minus the squared Mahalanobis distance. With 200 pictures and 384
features the covariance has no inverse, so it is shrunk towards a sphere by Ledoit and Wolf's rule (J. Multivariate
Analysis 88, 2004). A second Gaussian around the patch tokens of all good pictures gives a map; the paper trains on
64-pixel patches for that, here any encoder's tokens serve. Pictures are resized as a whole, at training and at test.

Shapes: n pictures, N = rows * columns patches, D width.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .data.colour import blur
from .data.decode import Decoder
from .data.sources import Images, open_named
from .data.views import Box, cut
from .encoder import Encoder, wrap
from .hub.load import load_encoder
from .monitor.pictures import Column, sheet

_MOST_PATCHES = 65_536  # float64 rows of a covariance: 200 MB at 384 features; evenly spread over the pictures


class Gaussian(NamedTuple):
    """A density over features."""

    mean: Tensor
    """[D] float64"""
    whiten: Tensor
    """[D, D] float64: |whiten (x - mean)| is the Mahalanobis distance"""
    shrinkage: float
    """0: the covariance as measured; 1: a sphere"""

    def distance(self, features: Tensor) -> Tensor:
        """Mahalanobis distance of unit-length features: [..., D] -> float64 [...]."""
        unit = normalize(features.double(), dim=-1)
        return ((unit - self.mean) @ self.whiten.T).square().sum(-1).sqrt()


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and shrunk covariance of [n, D] features, brought to unit length first.

    Raises:
        ValueError: fewer than two different features.
    """
    x = normalize(features.double(), dim=1)
    n, d = x.shape
    mean = x.mean(0)
    x = x - mean
    covariance = x.T @ x / n
    sphere = covariance.trace() / d
    off = (covariance - sphere * torch.eye(d, dtype=x.dtype)).square().sum()  # Ledoit-Wolf's d^2 x D
    if n < 2 or sphere <= 0:
        raise ValueError(
            f"{n} pictures with equal features give no density: more, and different, good pictures are needed"
        )
    noise = (x.square().sum(1).square().sum() / n - covariance.square().sum()) / n  # its b^2 x D
    shrinkage = float((noise / off).clamp(0, 1)) if off > 0 else 1.0
    values, vectors = torch.linalg.eigh(covariance)
    values = (1 - shrinkage) * values.clamp_min(0) + shrinkage * sphere
    values = values.clamp_min(1e-12 * float(values.max()))  # duplicates of one picture: directions without any spread
    return Gaussian(mean, values.rsqrt()[:, None] * vectors.T, shrinkage)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, ties counted half: the share of (positive, negative) pairs in the right order.

    Args:
        scores: [n], higher means positive.
        positive: [n] bool; NaN is returned when all are alike.
    """
    order = scores.double().sort()
    values, counts = torch.unique_consecutive(order.values, return_counts=True)
    ends = counts.cumsum(0)
    ranks = (ends - (counts - 1) / 2).double().repeat_interleave(counts)  # 1-based, mean rank of ties
    hits = positive[order.indices]
    p, q = int(hits.sum()), int((~hits).sum())
    return (float(ranks[hits].sum()) - p * (p + 1) / 2) / (p * q) if p and q else math.nan


class Score(NamedTuple):
    """What was found in pictures."""

    images: Tensor
    """float64 [n], distance of the whole picture"""
    maps: Tensor | None
    """float64 [n, rows, columns], distance of each patch; None: this encoder has no patches"""


class Detector:
    """An encoder and the Gaussians of what is normal.

    Args:
        name: an exported folder, a run's folder, `hf-hub:...` or a timm model.
        size: side in pixels, or (height, width); None: as it was trained.
    """

    def __init__(self, name: str | Path, size: int | tuple[int, int] | None = None, device: str = "cpu") -> None:
        model = load_encoder(name, size=size)
        facts: dict[str, Any] = vars(model)["pretrained_cfg"]
        channels, height, width = facts["input_size"]
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
        self.encoder: Encoder = wrap(model).to(device)
        self.size, self.decoder, self.device = (int(height), int(width)), Decoder(int(channels)), device
        self.mean, self.std = (torch.tensor(facts[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.whole: Gaussian | None = None
        self.patch: Gaussian | None = None

    def picture(self, source: Images, i: int) -> Tensor:
        """Image `i`, resized as a whole: uint8 [C, H, W]. `ValueError` if it cannot be read."""
        image = self.decoder(source.read(i)[0])
        return cut(image, Box(0, 0, image.shape[1], image.shape[2]), self.size, "bicubic")

    def fit(self, good: Images, batch: int = 32) -> None:
        """Measure what is normal."""
        found = list(self._encode(good, batch))
        self.whole = fit_gaussian(torch.cat([pooled for pooled, _ in found]))
        patches = torch.cat([tokens for _, tokens in found]).flatten(0, 1)
        if self.encoder.family != "pooled":
            self.patch = fit_gaussian(patches[:: -(-len(patches) // _MOST_PATCHES)])

    def score(self, source: Images, batch: int = 32) -> Score:
        """Distances of all pictures of `source`, in their order."""
        assert self.whole is not None, "fit first"
        images, maps = [], []
        for pooled, tokens in self._encode(source, batch):
            images.append(self.whole.distance(pooled))
            if self.patch is not None:
                maps.append(self.patch.distance(tokens).unflatten(1, self.encoder.grid(*self.size)))
        return Score(torch.cat(images), torch.cat(maps) if maps else None)

    def heat(self, maps: Tensor) -> Tensor:
        """Maps at the size of the pictures, a Gaussian of half a patch around each value: [n, H, W] float32."""
        stride = self.encoder.stride
        fine = maps.float().repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        return blur(fine, stride / 2)

    @torch.inference_mode()
    def _encode(self, source: Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pooled features [b, D] and patch tokens [b, N, D], on the CPU."""
        for start in range(0, len(source), batch):
            stop = min(start + batch, len(source))
            pictures = torch.stack([self.picture(source, i) for i in range(start, stop)]).to(self.device)
            tokens = self.encoder((pictures.float() / 255 - self.mean) / self.std)
            yield tokens.cls.float().cpu(), tokens.patches.float().cpu()


def paint(pictures: Tensor, heat: Tensor, low: float, high: float) -> Tensor:
    """Red where `heat` is above `low`, full at `high`, over the gray picture: uint8 [n, 3, H, W]."""
    gray = pictures.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    strength = ((heat - low) / max(high - low, 1e-12)).clamp(0, 1).unsqueeze(1)
    red = torch.tensor([220.0, 30.0, 30.0]).view(1, 3, 1, 1)
    return (gray * (1 - 0.8 * strength) + red * 0.8 * strength).round().to(torch.uint8)


def find_anomalies(
    encoder: str | Path,
    good: str | Path,
    test: str | Path,
    out: Path,
    *,
    good_name: str = "good",
    size: int | None = None,
    shown: int = 16,
    device: str = "cpu",
) -> dict[str, float]:
    """Fit on the folder `good`, score the folder `test`, write `scores.csv`, `summary.json` and `heat.png` to `out`.

    Args:
        good_name: the sub-folder of `test` whose pictures are good; with it and another one the AUROC is known.
        shown: pictures on the sheet, those with the highest scores.

    Returns:
        the summary: `images`, `fitted_on`, `shrinkage`, and `auroc` if there are labels.
    """
    detector = Detector(encoder, size, device)
    normal, tested = (open_named(str(folder)) for folder in (good, test))
    detector.fit(normal)
    score = detector.score(tested)
    assert detector.whole is not None
    summary = {"images": len(tested), "fitted_on": len(normal), "shrinkage": detector.whole.shrinkage}
    names = tested.class_names
    if names is not None and tested.labels is not None:
        if good_name not in names:
            raise ValueError(
                f"{test} has the folders {', '.join(names)}: name the one of good pictures with --good-name"
            )
        summary["auroc"] = auroc(score.images, tested.labels != names.index(good_name))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "score"])
        writer.writerows([tested.name(i), f"{value:.6g}"] for i, value in enumerate(score.images.tolist()))
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if score.maps is not None:
        _heat_sheet(detector, tested, score, shown).save(out / "heat.png")
    return summary


def _heat_sheet(detector: Detector, source: Images, score: Score, shown: int) -> Image.Image:
    """The pictures with the highest scores and their maps; red starts where 9 of 10 patches end."""
    assert score.maps is not None
    values = score.maps.flatten()
    low = float(values.kthvalue(max(1, int(0.9 * len(values)))).values)
    worst = score.images.argsort(descending=True)[:shown]
    pictures = torch.stack([detector.picture(source, i) for i in worst.tolist()])
    heat = detector.heat(score.maps[worst])
    painted = paint(pictures, heat, low, float(heat.max()))
    columns = [Column("picture", "highest score first", pictures), Column("heat", "red: far from normal", painted)]
    return sheet(columns, images=shown, cell=112, blocks=2 if len(worst) > 4 else 1)
