from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.data.sampler import GlobalBatches, epoch_order


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = {(s, e): epoch_order(50, seed=s, epoch=e).tolist() for s in (0, 1) for e in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    np.random.seed(3)
    assert epoch_order(50, seed=0, epoch=0).tolist() == orders[0, 0]


def test_order_is_the_one_of_every_version():
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_short_last_batch_of_an_epoch_is_an_ordinary_one():
    batches = GlobalBatches(num_samples=10, batch_size=4, seed=0)
    assert batches.steps_per_epoch == 3
    epoch = list(islice(batches.starting_at(), 3))
    assert [len(batch.indices) for batch in epoch] == [4, 4, 2]
    assert sorted(i for batch in epoch for i in batch.indices) == list(range(10))
    assert [(batch.epoch, batch.offset) for batch in epoch] == [(0, 4), (0, 8), (1, 0)]


@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 20))
def test_resuming_at_any_position_continues_the_same_batches(num_samples, batch_size, steps):
    batches = GlobalBatches(num_samples=num_samples, batch_size=batch_size, seed=5)
    whole = list(islice(batches.starting_at(), steps + 5))
    position = whole[steps - 1][1:] if steps else (0, 0)
    assert list(islice(batches.starting_at(*position), 5)) == whole[steps:]


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="cannot draw"):
        GlobalBatches(num_samples=0, batch_size=4, seed=0)
