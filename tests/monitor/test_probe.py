"""The probe: what it returns, and the same to the bit on any number of processes."""

import threading

import pytest
import torch

from hybrid_ssl.monitor.features import feature_std
from hybrid_ssl.monitor.knn import knn_accuracy
from hybrid_ssl.monitor.probe import Probe

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]


def images(n, seed, side=8):
    """Class c is bright in channel c."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    pixels = torch.randint(0, 150, (n, 3, side, side), generator=g)
    pixels[torch.arange(n), labels] += 60
    return pixels.to(torch.uint8), labels


def probe(**more):
    return Probe(*images(57, 0), *images(23, 1), mean=MEAN, std=STD, k=5, **more)


def encode(x):
    weight = torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(2))
    return (x.flatten(1) @ weight).relu()


class Ranks:
    """Threads that stand for processes; `gather` puts their tensors together in rank order."""

    def __init__(self, world):
        self.world, self.barrier, self.parts = world, threading.Barrier(world), [None] * world

    def gather(self, rank):
        def together(part):
            self.parts[rank] = part
            self.barrier.wait()
            whole = torch.cat(self.parts)
            self.barrier.wait()
            return whole

        return together

    def run(self, work):
        results = [None] * self.world

        def one(rank):
            results[rank] = work(rank, self.gather(rank))

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.world)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return results


def test_numbers_are_those_of_the_plain_functions():
    p = probe()
    found = p.measure(encode, batch_size=16)
    (train, train_labels), (test, test_labels) = images(57, 0), images(23, 1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    train, test = (encode((x / 255 - mean) / std) for x in (train, test))
    assert list(found) == ["knn", "std", "rank", "rank_centred"]
    assert found["knn"] == pytest.approx(knn_accuracy(train, train_labels, test, test_labels, k=5))
    assert found["std"] == pytest.approx(feature_std(train), rel=1e-5)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_gives_the_same_bits(world):
    alone = probe().measure(encode, batch_size=8)
    results = Ranks(world).run(lambda r, g: probe(rank=r, world=world, gather=g).measure(encode, batch_size=8))
    assert results == [alone] * world


def test_raw_pixels_are_computed_once_and_beat_chance():
    p = probe()
    first = p.raw_pixels()
    p.train_images = p.train_images * 0
    assert p.raw_pixels() == first > 0.6


def test_raw_pixels_of_large_images_are_area_averages():
    big, labels = images(30, 0, side=64)
    small = torch.nn.functional.avg_pool2d(big.float() / 255, 2).flatten(1)
    p = Probe(big, labels, big, labels, mean=MEAN, std=STD, k=3)
    assert p.raw_pixels() == knn_accuracy(small, labels, small, labels, k=3)


def test_without_labels_only_statistics():
    p = Probe(images(20, 0)[0], mean=MEAN, std=STD)
    assert not p.labelled and list(p.measure(encode)) == ["std", "rank", "rank_centred"]
    with pytest.raises(ValueError, match="needs labels"):
        p.raw_pixels()


def test_bf16_runs_under_autocast():
    seen = []

    def spy(x):
        seen.append((x @ x.transpose(2, 3)).dtype)
        return encode(x)

    found = probe().measure(spy, precision="bf16")
    assert set(seen) == {torch.bfloat16} and 0 <= found["knn"] <= 1


@pytest.mark.parametrize("world", [1, 2])
def test_later_features_are_compared_with_the_remembered_ones(world, monkeypatch):
    monkeypatch.setattr("hybrid_ssl.monitor.probe._START_IMAGES", 20)

    def look(rank=0, gather=None):
        p = probe(rank=rank, world=world, gather=gather)
        assert "start_cosine" not in p.measure(encode, batch_size=8)
        p.remember(encode, batch_size=8)
        return p.measure(encode, batch_size=8), p.measure(lambda x: encode(x.flip(1)), batch_size=8)

    for same, other in Ranks(world).run(look) if world > 1 else [look()]:
        assert same["start_cosine"] == pytest.approx(1) and same["start_cka"] == pytest.approx(1)
        pixels = (images(57, 0)[0][torch.linspace(0, 56, 20).long()] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / 0.2
        a, b = encode(pixels), encode(pixels.flip(1))
        assert other["start_cosine"] == pytest.approx(torch.cosine_similarity(a, b).mean().item(), abs=1e-5)
        assert other["start_cka"] < 0.9 and other["knn"] != same["knn"]


def test_non_finite_features_are_named():
    with pytest.raises(FloatingPointError, match="bf16"):
        probe().measure(lambda x: encode(x) * float("nan"), precision="fp16")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Probe(images(20, 0)[0].float(), mean=MEAN, std=STD), "uint8"),
        (lambda: Probe(images(20, 0)[0], images(20, 0)[1], mean=MEAN, std=STD), "or none of the three"),
        (lambda: Probe(*images(10, 0), *images(10, 1), mean=MEAN, std=STD), "monitor.k is 20"),
        (lambda: Probe(images(20, 0)[0], mean=MEAN, std=STD, world=2), "needs `gather`"),
    ],
)
def test_bad_probes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
