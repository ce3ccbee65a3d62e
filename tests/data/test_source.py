import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.data.source import ShuffledDialogues, check_position, epoch_order


def source(count: int, samples_per_step: int, seed: int = 0) -> ShuffledDialogues:
    """Numbers stand for the dialogues."""
    return ShuffledDialogues(dialogues=range(count), samples_per_step=samples_per_step, seed=seed)


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    orders = {(s, e): epoch_order(50, seed=s, epoch=e).tolist() for s in (0, 1) for e in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    np.random.seed(3)
    assert epoch_order(50, seed=0, epoch=0).tolist() == orders[0, 0]


def test_order_is_the_one_of_every_version():
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_short_last_step_of_a_pass_is_an_ordinary_one():
    ten = source(10, 4)
    steps = list(islice(ten.steps(), 3))
    assert [len(step.dialogues) for step in steps] == [4, 4, 2]
    assert sorted(n for step in steps for n in step.dialogues) == list(range(10))
    assert [ten.passes(step.position) for step in steps] == [0, 0, 1] and ten.passes(None) == 0


@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 20))
def test_resuming_at_any_position_continues_the_same_steps(num_samples, batch_size, steps):
    numbers = source(num_samples, batch_size, seed=5)
    whole = list(islice(numbers.steps(), steps + 5))
    position = json.loads(json.dumps(whole[steps - 1].position)) if steps else None
    assert list(islice(numbers.steps(position), 5)) == whole[steps:]


def test_nothing_to_draw_from_is_refused():
    with pytest.raises(ValueError, match="cannot draw"):
        source(0, 4)


@pytest.mark.parametrize(
    "position",
    [3, [], {"epoch": 0}, {"epoch": 0, "offset": -1}, {"epoch": True, "offset": 0}, {"epoch": 0.0, "offset": 0}],
)
def test_a_position_that_no_source_gives_is_refused(position):
    with pytest.raises(ValueError, match="no source"):
        check_position(position)
