"""The probe: the same images through the encoder every so often, and a few numbers about what comes out.

With labels it is weighted k-NN (`knn.py`), to be read beside the same k-NN on raw pixels: an encoder that does not beat
its own input has learned nothing that helps. Without labels, feature statistics (`features.py`) still tell whether the
features differ between images.

The work is dealt out to processes in whole batches, the last one filled up, so that every batch has the same size and
content on any number of processes and the numbers are the same to the bit. Shapes: n images, B batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .features import feature_stats, linear_cka, paired_cosine
from .knn import knn_accuracy, knn_predictions

Encode = Callable[[Tensor], Tensor]
"""normalised float images [B, C, H, W] -> features [B, D]"""
Gather = Callable[[Tensor], Tensor]
"""[r, ...] of each process -> [world * r, ...] in rank order, on every process"""

_PIXELS = 32  # raw pixels are compared at 32 x 32 at most, as in Tiny Images; 224 x 224 is 600 kB an image
_STAT_IMAGES = 16_384  # a spectrum needs no more; evenly spread, since folders are sorted by class
_START_IMAGES = 1024  # likewise of the comparison with the start, whose Gram matrices are n x n
_CHUNK = 256  # test images of one k-NN comparison, fixed so that rounding does not depend on the processes


class Probe:
    """A fixed set of images and what is measured on their features.

    Args:
        train_images: uint8 [n, C, H, W]; with labels the k-NN's memory, without the only images.
        train_labels: [n] int64 from 0, or None.
        test_images: uint8 [m, C, H, W], needed with labels.
        test_labels: [m] int64.
        mean, std: per channel in 0..1, as in training.
        k, temperature: of the k-NN.
        rank, world, gather: this process, how many there are, and how their tensors are put together.
    """

    def __init__(
        self,
        train_images: Tensor,
        train_labels: Tensor | None = None,
        test_images: Tensor | None = None,
        test_labels: Tensor | None = None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        k: int = 20,
        temperature: float = 0.07,
        rank: int = 0,
        world: int = 1,
        gather: Gather | None = None,
    ) -> None:
        self.train_images, self.train_labels = train_images, train_labels
        self.test_images, self.test_labels = test_images, test_labels
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.k, self.temperature = k, temperature
        self.rank, self.world, self._gather = rank, world, gather
        self._raw: float | None = None
        self._start: Tensor | None = None
        self._check()

    @property
    def labelled(self) -> bool:
        return self.train_labels is not None

    def raw_pixels(self, device: torch.device | str = "cpu") -> float:
        """k-NN accuracy of the pixels themselves, scaled to 0..1, at most 32 x 32 (area averages); computed once.

        Any process may call it alone.
        """
        if self._raw is None:
            if self.train_labels is None or self.test_images is None or self.test_labels is None:
                raise ValueError("raw pixels are compared by k-NN: the probe needs labels and test images")
            train, test = (small_pixels(images).to(device) for images in (self.train_images, self.test_images))
            self._raw = knn_accuracy(train, self.train_labels, test, self.test_labels, self.k, self.temperature, _CHUNK)
        return self._raw

    @torch.no_grad()
    def remember(
        self,
        encode: Encode,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        """Keep the features of some images: `measure` then also says how like them the later ones are."""
        images = self.train_images[_spread(len(self.train_images), _START_IMAGES)]
        self._start = self._features(images, encode, torch.device(device), batch_size, precision)

    @torch.no_grad()
    def measure(
        self,
        encode: Encode,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> dict[str, float]:
        """`knn` (with labels), `std`, `rank` and `rank_centred` of the features that `encode` gives; after `remember`
        also `start_cosine` and `start_cka`, the likeness to the remembered ones.

        All processes call it together and get the same numbers. `encode` is expected to be in eval mode.
        """
        device = torch.device(device)
        train = self._features(self.train_images, encode, device, batch_size, precision)
        numbers: dict[str, float] = {}
        if self.train_labels is not None and self.test_images is not None and self.test_labels is not None:
            test = self._features(self.test_images, encode, device, batch_size, precision)
            numbers["knn"] = self._knn(train, self.train_labels, test, self.test_labels)
        numbers |= feature_stats(train[_spread(len(train), _STAT_IMAGES).to(device)])
        if self._start is not None:
            now = train[_spread(len(train), _START_IMAGES).to(device)]
            numbers |= {"start_cosine": paired_cosine(self._start, now), "start_cka": linear_cka(self._start, now)}
        if self.world > 1:  # everybody acts on rank 0's numbers, also where processors round differently
            mine = torch.tensor([list(numbers.values())], dtype=torch.float64, device=device)
            numbers = dict(zip(numbers, self._together(mine)[0].tolist(), strict=True))
        return numbers

    def _features(self, images: Tensor, encode: Encode, device: torch.device, size: int, precision: str) -> Tensor:
        """Features of all images on every process: float32 [n, D]."""
        mean, std = self.mean.to(device), self.std.to(device)
        kind = torch.float16 if precision == "fp16" else torch.bfloat16
        found = []
        for rows in _share(len(images), size, self.rank, self.world).split(size):
            batch = images[rows].to(device)  # uint8 on the way: a quarter of the bytes
            with torch.autocast(device.type, dtype=kind, enabled=precision != "fp32"):
                found.append(encode((batch.float() / 255 - mean) / std).float())  # [size, D]
        features = self._together(torch.cat(found))[: len(images)]
        if not features.isfinite().all():
            raise FloatingPointError(
                f"the encoder gives non-finite features in {precision}: weights are broken or activations overflow"
                + (" (fp16 ends at 65504; try run.precision=bf16)" if precision == "fp16" else "")
            )
        return features

    def _knn(self, train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
        rows = _share(len(test), _CHUNK, self.rank, self.world)
        mine = knn_predictions(train, labels, test[rows.to(test.device)], (self.k,), self.temperature, _CHUNK)[self.k]
        predicted = self._together(mine)[: len(test)].cpu()
        return (predicted == wanted.cpu()).double().mean().item()

    def _together(self, part: Tensor) -> Tensor:
        return part if self._gather is None else self._gather(part)

    def _check(self) -> None:
        if self.world > 1 and self._gather is None:
            raise ValueError(f"a probe on {self.world} processes needs `gather`")
        for images in (self.train_images, self.test_images):
            if images is None:
                continue
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (len(self.mean), 1):
                wanted = f"uint8 [n, {len(self.mean)}, H, W]"
                raise ValueError(f"probe images are {wanted}, got {images.dtype} {tuple(images.shape)}")
        given = [x is not None for x in (self.train_labels, self.test_images, self.test_labels)]
        if any(given) and not all(given):
            raise ValueError("a probe has training labels, test images and test labels, or none of the three")
        if len(self.train_images) < 2:
            raise ValueError(f"a probe needs at least 2 images, got {len(self.train_images)}")
        if self.labelled and self.k > len(self.train_images):
            have = f"the probe has {len(self.train_images)} training images"
            raise ValueError(f"monitor.k is {self.k}, but {have}: lower k or add images")


def _spread(n: int, most: int) -> Tensor:
    """Rows of at most `most` of `n` images, at even distances."""
    return torch.linspace(0, n - 1, min(n, most)).long()


def _share(n: int, size: int, rank: int, world: int) -> Tensor:
    """Rows of rank `rank`: whole blocks of `size`, equally many on each rank; what goes beyond repeats the last row."""
    blocks = -(-n // (size * world))
    first = rank * blocks * size
    return torch.arange(first, first + blocks * size).clamp_max(n - 1)


def small_pixels(images: Tensor) -> Tensor:
    """uint8 [n, C, H, W] -> float32 [n, C * h * w] in 0..1, h and w at most 32."""
    small = (min(images.shape[2], _PIXELS), min(images.shape[3], _PIXELS))
    parts = [adaptive_avg_pool2d(part.float() / 255, small).flatten(1) for part in images.split(1024)]
    return torch.cat(parts)
