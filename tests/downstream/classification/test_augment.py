"""Augmentation is a function of the sample's generator, is timm's where it says so, and moves all channels alike."""

from __future__ import annotations

import random
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from hybrid_ssl.downstream.classification.augment import Augment, RandAugment, _lent_stream, erase
from hybrid_ssl.downstream.classification.settings import AugmentSettings

WORDS = "rand-m9-mstd0.5-inc1"


def picture(channels: int, side: int = 24) -> Tensor:
    return torch.randint(0, 256, (channels, side, side + 6), generator=torch.Generator().manual_seed(channels)).byte()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_same_generator_same_bits_and_no_global_stream_is_touched(channels: int) -> None:
    augment = Augment(AugmentSettings(erase=0.5), (16, 20), [0.5] * channels, [0.2] * channels)
    image = picture(channels)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    made = [augment(image, Random(seed)) for seed in range(12)]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert all(each.shape == (channels, 16, 20) and each.dtype == torch.uint8 for each in made)
    random.seed(99)
    assert all(torch.equal(augment(image, Random(seed)), each) for seed, each in enumerate(made))
    assert len({each.numpy().tobytes() for each in made}) == 12
    assert torch.equal(image, picture(channels)), "the picture itself was changed"


def test_each_operation_is_timms() -> None:
    ours, theirs = RandAugment(WORDS, [127.5] * 3), rand_augment_transform(WORDS, {"img_mean": (128,) * 3})
    assert len(ours.ops) == len(theirs.ops) == 15 and ours.count == 2
    image = Image.fromarray(picture(3).permute(1, 2, 0).numpy())
    for (mine,), other in zip(ours.ops, theirs.ops, strict=True):
        for seed in range(4):
            with _lent_stream(seed):
                found = np.array(mine(image))
            random.seed(seed)
            assert np.array_equal(found, np.array(other(image)))


@pytest.mark.parametrize("words", [WORDS, "rand-m1", "rand-m10-mstd5-inc1"])
def test_no_strength_breaks_an_operation(words: str) -> None:
    image = Image.fromarray(picture(3, side=8).permute(1, 2, 0).numpy())
    for (apply,) in RandAugment(words, [127.5] * 3).ops:
        for seed in range(40):
            with _lent_stream(seed):
                assert apply(image).size == image.size


def test_many_channels_are_moved_alike_and_never_recoloured() -> None:
    one = picture(1)
    made = RandAugment(WORDS, [100.0] * 5)
    assert len(made.ops) == 5, "Rotate, Shear and Translate"
    out = [made(one.expand(5, -1, -1), Random(seed)) for seed in range(20)]
    assert all(torch.equal(each, each[:1].expand(5, -1, -1)) for each in out)
    assert sum(not torch.equal(each[:1], one) for each in out) > 10


def test_wrong_words_are_refused() -> None:
    for words in ("randaugment", "rand-x9", "strong"):
        with pytest.raises(ValueError, match="augment.rand_augment.*is not like rand-m9-mstd0.5-inc1"):
            RandAugment(words, [128.0] * 3)


def test_erased_rectangle_is_noise_of_the_datas_kind() -> None:
    image = torch.zeros(2, 200, 200, dtype=torch.uint8)
    values, shares = [], []
    for seed in range(30):
        out = erase(image, [100.0, 150.0], [10.0, 20.0], Random(seed))
        painted = out[0] > 0
        rows, columns = painted.any(1).sum(), painted.any(0).sum()
        assert painted.sum() == rows * columns, "one rectangle"
        shares.append(float(painted.float().mean()))
        values.append(out[:, painted].float())
    both = torch.cat(values, 1)
    assert both.mean(1) == pytest.approx([100, 150], abs=0.5) and both.std(1) == pytest.approx([10, 20], abs=0.5)
    assert 0.015 < min(shares) and max(shares) < 0.35


def test_nothing_happens_when_all_is_off() -> None:
    cfg = AugmentSettings(scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.0, rand_augment=None, erase=0.0)
    image = picture(3)[..., :24]
    assert torch.equal(Augment(cfg, (24, 24), [0.5] * 3, [0.2] * 3)(image, Random(0)), image)
