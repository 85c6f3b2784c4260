"""Mixing is keyed, keeps images and targets in step, and is what its papers say."""

from __future__ import annotations

from random import Random

import pytest
import torch

from hybrid_ssl.downstream.classification.mix import mix, soft
from hybrid_ssl.downstream.classification.settings import MixSettings

IMAGES = torch.stack([torch.full((3, 12, 10), value, dtype=torch.uint8) for value in (0, 250, 100, 50)])
LABELS = torch.tensor([0, 1, 2, 0])
TARGETS = soft(LABELS, 3, 0.0)


def test_smoothing_is_spread_over_all_classes() -> None:
    assert soft(torch.tensor([1]), 4, 0.2).tolist() == [pytest.approx([0.05, 0.85, 0.05, 0.05])]


@pytest.mark.parametrize("seed", range(8))
def test_mixup_blends_pixels_and_labels_by_one_share(seed: int) -> None:
    images, targets = mix(MixSettings(cutmix=0.0), IMAGES, TARGETS, Random(seed))
    rng = Random(seed)
    rng.random(), rng.random()
    share = rng.betavariate(0.8, 0.8)
    expected = IMAGES.float() * share + IMAGES.flip(0).float() * (1 - share)
    assert (images.float() - expected).abs().max() <= 0.5 and images.dtype == torch.uint8
    assert torch.allclose(targets, TARGETS * share + TARGETS.flip(0) * (1 - share))


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_labels_follow_the_pixels_that_were_pasted(seed: int) -> None:
    images, targets = mix(MixSettings(mixup=0.0), IMAGES, TARGETS, Random(seed))
    pasted = images != IMAGES  # every image differs from its partner everywhere
    share = 1 - pasted.float().mean().item()
    assert torch.equal(images, torch.where(pasted, IMAGES.flip(0), IMAGES))
    assert torch.allclose(targets, TARGETS * share + TARGETS.flip(0) * (1 - share), atol=1e-6)
    rows, columns = pasted[0, 0].any(1).sum(), pasted[0, 0].any(0).sum()
    assert pasted[0, 0].sum() == rows * columns


def test_mixing_depends_on_the_generator_alone_and_leaves_its_input() -> None:
    before, cfg = IMAGES.clone(), MixSettings()
    made = [mix(cfg, IMAGES, TARGETS, Random(seed)) for seed in range(10)]
    again = [mix(cfg, IMAGES, TARGETS, Random(seed)) for seed in range(10)]
    assert all(torch.equal(a, b) and torch.equal(s, t) for (a, s), (b, t) in zip(made, again, strict=True))
    assert torch.equal(IMAGES, before)
    assert all(torch.allclose(targets.sum(1), torch.ones(4)) for _, targets in made)


def test_off_means_untouched() -> None:
    for cfg in (MixSettings(mixup=0.0, cutmix=0.0), MixSettings(p=0.0)):
        images, targets = mix(cfg, IMAGES, TARGETS, Random(0))
        assert images is IMAGES and targets is TARGETS


def test_switch_chooses_between_the_two() -> None:
    for switch, cut in ((0.0, False), (1.0, True)):
        for seed in range(5):
            images, _ = mix(MixSettings(switch=switch), IMAGES, TARGETS, Random(seed))
            kinds = {len(each.unique()) for each in images}
            assert (kinds == {1}) != cut or cut and kinds <= {1, 2}
