"""k-NN against a loop written from the definition, and its promises on ties, chunks and bad input."""

import math

import pytest
import torch

from hybrid_ssl.monitor.knn import knn_accuracy, knn_predictions, nearest


def data(n=60, m=25, d=6, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    labels = torch.randint(classes, (n,), generator=g)
    return train, labels, test, torch.randint(classes, (m,), generator=g)


def by_hand(train, labels, test, k, temperature):
    predicted = []
    for x in test.tolist():
        scored = []
        for i, y in enumerate(train.tolist()):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            scored.append((dot / math.hypot(*x) / math.hypot(*y), -i))
        votes = {}
        for cosine, i in sorted(scored, reverse=True)[:k]:
            label = int(labels[-i])
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        predicted.append(max(sorted(votes), key=lambda c: votes[c]))
    return torch.tensor(predicted)


@pytest.mark.parametrize("k", [1, 3, 20, 60])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_predictions_equal_a_loop(k, temperature):
    train, labels, test, _ = data()
    predicted = knn_predictions(train, labels, test, (k,), temperature)[k]
    assert predicted.tolist() == by_hand(train, labels, test, k, temperature).tolist()


def test_accuracy_equals_scipys_tree_on_the_sphere():
    from scipy.spatial import cKDTree

    train, labels, test, wanted = data(n=400, m=200, d=8)
    unit, queries = (torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (train, test))
    distance, index = cKDTree(unit).query(queries, k=20)
    weight = torch.from_numpy((1 - distance**2 / 2) / 0.07).exp()  # |a - b|^2 = 2 - 2 cos
    votes = torch.zeros(200, 5, dtype=torch.float64).scatter_add_(1, labels[torch.from_numpy(index)], weight)
    expected = (votes.argmax(1) == wanted).double().mean().item()
    assert knn_accuracy(train, labels, test, wanted) == pytest.approx(expected, abs=1e-7)


def test_several_k_equal_one_by_one():
    train, labels, test, _ = data()
    together = knn_predictions(train, labels, test, (20, 1, 7))
    assert list(together) == [20, 1, 7]
    for k, predicted in together.items():
        assert torch.equal(predicted, knn_predictions(train, labels, test, (k,))[k])


@pytest.mark.parametrize("chunk", [1, 4, 25, 1000, None])
def test_chunks_do_not_matter(chunk):
    train, labels, test, wanted = data()
    assert knn_accuracy(train, labels, test, wanted, chunk=chunk) == knn_accuracy(train, labels, test, wanted)


def test_first_of_equals_counts_and_lowest_class_wins():
    train = torch.tensor([[1.0, 0.0]] * 6)
    labels = torch.tensor([3, 3, 1, 1, 0, 0])
    test = torch.tensor([[2.0, 0.0]])
    found = knn_predictions(train, labels, test, (2, 3, 4, 6))
    assert [int(found[k]) for k in (2, 3, 4, 6)] == [3, 3, 1, 0]


def test_nearest_equals_a_stable_sort():
    similarity = torch.randint(0, 4, (50, 30), generator=torch.Generator().manual_seed(1)).float()
    values, index = nearest(similarity, 7)
    full, columns = similarity.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, full[:, :7]) and torch.equal(index, columns[:, :7])


def test_tiny_temperature_and_half_floats_stay_finite():
    train, labels, test, wanted = data()
    cold = knn_accuracy(train, labels, test, wanted, temperature=1e-4)
    assert cold == knn_accuracy(train, labels, test, wanted, k=1)
    assert 0 <= knn_accuracy(train.half(), labels, test.half(), wanted) <= 1


def test_unseen_label_counts_as_missed():
    train, labels, _, _ = data()
    assert knn_accuracy(train, labels, train[:4], torch.tensor([9, 9, 9, 9])) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 61}, "k goes from 1 to 60"),
        ({"k": 0}, "k goes from 1 to 60"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"train_labels": torch.full((60,), -1)}, "labels from 0"),
        ({"train_labels": torch.zeros(59, dtype=torch.int64)}, "one integer label"),
        ({"test": torch.zeros(3, 5)}, r"\[n, D\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    train, labels, test, wanted = data()
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{"train": train, "train_labels": labels, "test": test, "test_labels": wanted} | change)
