"""mIoU and accuracies: against a count by hand, against brute force, over two processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybrid_ssl.downstream.segmentation.metrics import IGNORED, Confusion, measures
from tests.ranks import run_two_ranks

TRUTH = torch.tensor([[0, 0, 1, 1], [0, 1, 1, IGNORED]])
FOUND = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 2]])


def drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    truth, found = rng.integers(-1, 6, (12, 9, 7)), rng.integers(0, 6, (12, 9, 7))
    truth[truth == 4] = 0  # class 4 is predicted and nowhere true
    return truth, np.where(rng.random(truth.shape) < 0.5, truth.clip(0), found)


def brute_force(truth: np.ndarray, found: np.ndarray, classes: int) -> dict[str, float]:
    known = truth != IGNORED
    truth, found = truth[known], found[known]
    iou = {k: ((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum() for k in range(classes)}
    recall = [(found[truth == k] == k).mean() for k in range(classes) if (truth == k).any()]
    out = {"mIoU": np.mean(list(iou.values())), "pixel_accuracy": (truth == found).mean()}
    return out | {"mean_accuracy": np.mean(recall)} | {f"IoU/{k}": value for k, value in iou.items()}


def of_my_half() -> list[float]:
    truth, found = drawn()
    mine = slice(torch.distributed.get_rank(), None, 2)
    confusion = Confusion(6)
    confusion.add(torch.from_numpy(found[mine]), torch.from_numpy(truth[mine]))
    return list(measures(confusion.total(), [str(k) for k in range(6)]).values())


def test_numbers_of_eight_pixels_are_those_counted_by_hand() -> None:
    confusion = Confusion(4)
    confusion.add(FOUND, TRUTH)
    # class 0: 2 hits of 3 true, 1 predicted wrongly; class 1: 3 of 4, 1 predicted wrongly; the eighth is ignored
    assert confusion.total()[:2, :2].tolist() == [[2, 1], [1, 3]] and int(confusion.total().sum()) == 7
    found = measures(confusion.total(), ["a", "b", "c", "d"])
    assert found["IoU/a"] == pytest.approx(2 / 4) and found["IoU/b"] == pytest.approx(3 / 5)
    assert found["mIoU"] == pytest.approx((2 / 4 + 3 / 5) / 2)
    assert found["pixel_accuracy"] == pytest.approx(5 / 7)
    assert found["mean_accuracy"] == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_a_class_that_is_nowhere_is_left_out_and_that_is_said() -> None:
    confusion = Confusion(3)
    confusion.add(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    found = measures(confusion.total(), ["a", "b", "c"])
    assert found["IoU/b"] == 0 and "IoU/c" not in found and found["classes_measured"] == 2
    assert found["mIoU"] == pytest.approx(1 / 3)


def test_counts_do_not_lose_pixels_beyond_what_float32_counts() -> None:
    confusion = Confusion(2)
    confusion.counts += torch.tensor([[2**24, 0], [0, 2**40]])
    confusion.add(torch.tensor([0]), torch.tensor([0]))
    assert confusion.total().tolist() == [[2**24 + 1, 0], [0, 2**40]]


def test_two_processes_count_what_brute_force_counts() -> None:
    truth, found = drawn()
    confusion = Confusion(6)
    confusion.add(torch.from_numpy(found), torch.from_numpy(truth))
    alone = measures(confusion.total(), [str(k) for k in range(6)])
    for name, value in brute_force(truth, found, 6).items():
        assert alone[name] == pytest.approx(value, abs=1e-12), name
    assert run_two_ranks(of_my_half) == [list(alone.values())] * 2
