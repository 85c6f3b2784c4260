"""k-NN, retrieval, logistic regression and draws against hand counts and an independent solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from hybrid_ssl.downstream.evaluation import knn, retrieval
from hybrid_ssl.downstream.evaluation.features import Split
from hybrid_ssl.downstream.evaluation.logistic import choose, fit, objective
from hybrid_ssl.downstream.evaluation.lowshot import draw
from hybrid_ssl.downstream.evaluation.settings import KnnSettings, LogisticSettings, RetrievalSettings
from hybrid_ssl.downstream.evaluation.work import Bench, accuracies, folds, held_out


def bench(n: int = 40, m: int = 30, dim: int = 5, classes: int = 4) -> Bench:
    draw = torch.Generator().manual_seed(0)
    parts = []
    for count in (n, m):
        labels = torch.randint(classes, (count,), generator=draw)
        features = torch.randn(count, dim, generator=draw) + 1.5 * torch.eye(classes, dim)[labels]
        parts.append(Split({"pooled": features, "pixels": features.abs()}, labels, torch.arange(count)))
    return Bench(parts[0], parts[1], list("abcd"), 0, torch.device("cpu"), print)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def vote(train: Tensor, labels: Tensor, x: list[float], k: int) -> int:
    ranked = sorted(((cosine(row, x), -i) for i, row in enumerate(train.tolist())), reverse=True)[:k]
    votes: dict[int, float] = {}
    for similarity, i in ranked:
        votes[int(labels[-i])] = votes.get(int(labels[-i]), 0.0) + math.exp(similarity / 0.07)
    return max(sorted(votes), key=lambda label: votes[label])


def test_knn_equals_a_count_by_hand() -> None:
    given = bench()
    found = knn.run(given, KnnSettings(k=[1, 7, 41], headline=7))
    for name, key in (("pooled", "k={}"), ("pixels", "raw_pixels/k={}")):
        train, test = given.train.features[name], given.test.features[name]
        for k in (1, 7):
            answers = [vote(train, given.train.labels, row, k) for row in test.tolist()]
            right = sum(a == b for a, b in zip(answers, given.test.labels.tolist(), strict=True))
            assert found.metrics[key.format(k)] == pytest.approx(right / len(answers), abs=1e-12)
    assert found.metrics["top1"] == found.metrics["k=7"] and "k=41" not in found.metrics  # 40 images


def average_precision(row: list[float], relevant: list[bool], k: int | None) -> float:
    """By the definition, one rank after the other."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    hits, total = 0, 0.0
    for place, i in enumerate(order[:k], start=1):
        if relevant[i]:
            hits += 1
            total += hits / place
    return total / min(sum(relevant), k or len(row))


@pytest.mark.parametrize("gallery", ["test", "train"])
def test_retrieval_equals_a_count_by_hand(gallery: str) -> None:
    given = bench()
    found = retrieval.run(given, RetrievalSettings(gallery=gallery, ks=[1, 5, 100])).metrics
    side = given.test if gallery == "test" else given.train
    wanted: dict[str, list[float]] = {}
    for q, x in enumerate(given.test.features["pooled"].tolist()):
        others = [i for i in range(len(side.labels)) if gallery == "train" or i != q]
        row = [cosine(side.features["pooled"][i].tolist(), x) for i in others]
        relevant = [bool(side.labels[i] == given.test.labels[q]) for i in others]
        best = sorted(range(len(row)), key=lambda i: -row[i])
        for name, k in (("mAP", None), ("mAP@1", 1), ("mAP@5", 5), ("mAP@100", 100)):
            wanted.setdefault(name, []).append(average_precision(row, relevant, k))
        for k in (1, 5, 100):
            wanted.setdefault(f"recall@{k}", []).append(float(any(relevant[i] for i in best[:k])))
    for name, values in wanted.items():
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-9), name
    assert found["queries"] == 30


def test_retrieval_ranks_equals_by_number_and_counts_queries_without_relevant_images() -> None:
    similarity = torch.tensor([[0.5, 0.9, 0.9, 0.1], [0.3, 0.2, 0.1, 0.0]])
    relevant = torch.tensor([[True, False, True, False], [False, False, False, False]])
    found = retrieval.precisions(similarity, relevant, [1, 2])
    assert found[0].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 0.0, 1 / 4, 0.0, 1.0])
    assert found[1, 0].isnan()
    alone = retrieval.precisions(torch.eye(2), torch.ones(2, 2, dtype=torch.bool), [1], torch.arange(2))
    assert alone.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]  # the only other one is found first


def test_logistic_regression_equals_scipy() -> None:
    given = bench(n=60)
    x, labels, classes, strength = given.train.features["pooled"], given.train.labels, 4, 0.01
    found = fit(x, labels, classes, strength, LogisticSettings(iterations=500))
    z = x.double().numpy()
    z = (z - z.mean(0)) / np.sqrt(((z - z.mean(0)) ** 2).mean())

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:20].reshape(4, 5), flat[20:]
        logits = z @ weight.T + bias
        high = logits.max(1)
        log_sum = high + np.log(np.exp(logits - high[:, None]).sum(1))
        return float((log_sum - logits[np.arange(60), labels.numpy()]).mean() + strength / 2 * (weight**2).sum())

    best = minimize(loss, np.zeros(24), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.weight.numpy().ravel(), best.x[:20], atol=2e-5)
    test = given.test.features["pooled"]
    scaled = (test.double().numpy() - x.double().numpy().mean(0)) / found.scale.item()
    answers = (scaled @ best.x[:20].reshape(4, 5).T + best.x[20:]).argmax(1)
    assert found.predict(test).tolist() == answers.tolist()


def test_gradient_of_the_objective_is_that_of_autograd_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = torch.randn(11, 3, dtype=torch.float64), torch.arange(11) % 4
    weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4,)))
    loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels) + 0.05 * weight.square().sum()
    loss.backward()
    for logits in (8, 2**24):
        monkeypatch.setattr("hybrid_ssl.downstream.evaluation.logistic._LOGITS", logits)
        found = objective(x, labels, weight.detach(), bias.detach(), 0.1)
        torch.testing.assert_close(found, (loss.detach(), weight.grad, bias.grad))


def test_of_equal_strengths_the_stronger_is_chosen() -> None:
    x, labels = torch.tensor([[0.0], [0.1], [0.2], [1.0], [1.1], [1.2]]), torch.tensor([0, 0, 0, 1, 1, 1])
    strength, shares = choose(
        x, labels, 2, folds(labels, 3, 0), LogisticSettings(strengths=[1e-3, 0.1, 1e-2], iterations=20)
    )
    assert set(shares.values()) == {1.0} and strength == 0.1


def test_features_of_any_scale_and_equal_ones_are_fitted() -> None:
    given = bench()
    x, labels, cfg = given.train.features["pooled"], given.train.labels, LogisticSettings(iterations=100)
    plain, large = (fit(scale * x, labels, 4, 0.01, cfg).predict(scale * x) for scale in (1.0, 1e6))
    assert torch.equal(plain, large)
    assert fit(torch.ones(40, 5), labels, 4, 0.01, cfg).bias.isfinite().all()


def test_every_class_gives_a_draw_the_same_number() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [3] * 2)
    few = draw(labels, 0.1, 0)
    assert labels[few.rows].bincount().tolist() == [3, 3, 0, 2]  # the smallest has two
    assert draw(labels, 0.001, 0).rows.shape == (3,) and few.name == "10percent-seed0"
    assert torch.equal(few.rows, draw(labels, 0.1, 0).rows)
    assert not torch.equal(few.rows, draw(labels, 0.1, 1).rows)


def test_what_is_held_out_has_images_of_every_class_that_can_give_one() -> None:
    labels = torch.tensor([0] * 20 + [1] * 2 + [2])
    fit_rows, held = held_out(labels, 0.1, 0)
    assert labels[held].bincount(minlength=3).tolist() == [2, 1, 0]
    assert sorted([*fit_rows.tolist(), *held.tolist()]) == list(range(23))
    with pytest.raises(ValueError, match="nothing can be held out"):
        held_out(torch.arange(4), 0.5, 0)


def test_folds_hold_out_every_image_once() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3)
    parts = folds(labels, 5, 0)
    assert len(parts) == 3 and sorted(torch.cat([held for _, held in parts]).tolist()) == list(range(10))
    assert all(labels[held].unique().tolist() == [0, 1] for _, held in parts)
    assert folds(torch.tensor([0, 0, 1]), 5, 0) == []


def test_accuracy_of_classes_counts_each_class_once() -> None:
    found = accuracies(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))
    assert found == {"top1": 0.75, "mean_class": 0.75}
    assert accuracies(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))["mean_class"] == 0.5
