"""Order and keys are functions of their arguments; ranks and accumulation only split what one process sees."""

from __future__ import annotations

from itertools import islice

import pytest

from hybrid_ssl.data.order import BatchOrder, key, keyed, permutation


def micro_batches(count: int, **changes: int) -> list:
    options = {"images": 100, "batch_size": 16, "micro_batch": 16, "seed": 3} | changes
    return list(islice(BatchOrder(**options), count))


def test_key_depends_on_every_argument() -> None:
    keys = {
        key(0, 0, 0, "a"),
        key(1, 0, 0, "a"),
        key(0, 1, 0, "a"),
        key(0, 0, 1, "a"),
        key(0, 0, 0, "b"),
        key(0, 0, 10, "a"),
    }
    assert len(keys) == 6 and all(0 <= k < 2**63 for k in keys)


def test_key_is_the_same_in_every_process() -> None:
    assert key(0, 1, 2, "plain/box") == 1651621991618573399  # changing it breaks the resume of every run there is
    assert keyed(0, 1, 2, "x").random() == keyed(0, 1, 2, "x").random()


def test_permutation_changes_with_epoch_and_seed() -> None:
    first = permutation(50, 0, 0).tolist()
    assert sorted(first) == list(range(50))
    assert first == permutation(50, 0, 0).tolist()
    assert first != permutation(50, 0, 1).tolist() and first != permutation(50, 1, 0).tolist()


def test_epoch_holds_every_image_at_most_once_and_drops_the_rest() -> None:
    epoch = micro_batches(6)
    ids = [i for micro in epoch for i in micro.ids]
    assert len(set(ids)) == 96 and {micro.epoch for micro in epoch} == {0}
    after = micro_batches(7)[-1]
    assert (after.epoch, after.step) == (1, 6)


@pytest.mark.parametrize(("world", "micro"), [(2, 8), (4, 4), (2, 4), (1, 4)])
def test_ranks_and_accumulation_see_the_same_global_batches(world: int, micro: int) -> None:
    accumulation = 16 // (world * micro)
    parts = [micro_batches(3 * accumulation, micro_batch=micro, world=world, rank=rank) for rank in range(world)]
    for step, whole in enumerate(micro_batches(3)):
        seen = [
            i
            for part in range(step * accumulation, (step + 1) * accumulation)
            for rank in range(world)
            for i in parts[rank][part].ids
        ]
        assert tuple(seen) == whole.ids
        assert all(parts[rank][step * accumulation].step == step for rank in range(world))


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_start_continues_the_same_sequence(start: int) -> None:
    assert micro_batches(20)[start:] == micro_batches(20 - start, start=start)


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 12"):
        BatchOrder(100, 16, 6, 0, world=2)
    with pytest.raises(ValueError, match="10 images"):
        BatchOrder(10, 16, 16, 0)
