import dataclasses
import itertools
import json
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.guards.state import LOSSES_KNOWN as KNOWN
from qwhisper.guards.state import RATE_CALM as CALM
from qwhisper.guards.state import RATE_DOWN as DOWN
from qwhisper.guards.state import RATE_LEAST as LEAST
from qwhisper.guards.state import RATE_UP as UP
from qwhisper.guards.state import RATE_WINDOW as WINDOW
from qwhisper.guards.state import DynamicRate

FLAT, FALLING = itertools.repeat(1.0), [2.0 - 0.01 * n for n in range(200)]


def observed(peaks, losses=FLAT) -> list[float]:
    rate, factors = DynamicRate(), []
    for loss, peak in zip(losses, peaks, strict=False):
        rate.observe(loss, peak)
        factors.append(rate.factor)
    return factors


def test_one_peak_changes_nothing_and_two_within_a_window_bring_it_down_once():
    assert set(observed([False] * KNOWN + [True] + [False] * WINDOW + [True])) == {1.0}
    factors = observed([False] * KNOWN + [True, True, True, True])
    assert factors[-4:] == [1.0, DOWN, DOWN, DOWN]


def test_peaks_while_the_loss_falls_change_nothing():
    assert set(observed([False] + [True] * 199, FALLING)) == {1.0}


def test_a_loss_that_rises_brings_it_down_without_any_peak():
    noise = np.random.default_rng(0).normal(0, 0.1, 200)
    still, rising = 1.0 + noise[:100], 1.0 + noise[100:] + 0.01 * np.arange(100)
    factors = observed([False] * 200, [*still, *rising])
    assert set(factors[:100]) == {1.0} and factors[-1] < 1.0


def test_among_the_first_losses_nothing_is_believed():
    assert set(observed([True] * (KNOWN - 1), [1.0] * 10 + [5.0] * (KNOWN - 11))) == {1.0}


def test_it_comes_back_to_one_when_they_are_over():
    factors = observed([False] * KNOWN + [True, True] + [False] * (WINDOW + CALM + 4 * WINDOW))
    first_up = factors.index(DOWN * UP)
    last_pair = KNOWN + WINDOW - 1  # the first of the two leaves the window one step later
    assert first_up == last_pair + CALM and factors[-1] == 1.0
    assert all(before <= after for before, after in itertools.pairwise(factors[first_up:]))


def test_what_is_not_finite_changes_no_average():
    rate = DynamicRate()
    rate.observe(1.0, False)
    rate.observe(math.nan, True)
    assert (rate.losses, rate.fast, rate.slow) == (1, 1.0, 1.0)


def test_it_goes_on_from_json_as_if_uninterrupted():
    losses, peaks = [*FALLING, *FALLING[::-1]], [n % 7 == 0 for n in range(400)]
    rate, factors = DynamicRate(), []
    for loss, peak in zip(losses, peaks, strict=True):
        rate = DynamicRate(**json.loads(json.dumps(dataclasses.asdict(rate))))
        rate.observe(loss, peak)
        factors.append(rate.factor)
    assert factors == observed(peaks, losses) and min(factors) < 1.0


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=400))
def test_it_stays_within_its_bounds_and_never_changes_twice_in_a_window(steps):
    factors = observed([peak for _, peak in steps], [loss for loss, _ in steps])
    assert all(LEAST <= factor <= 1.0 for factor in factors)
    changes = [n for n in range(1, len(factors)) if factors[n] != factors[n - 1]]
    assert all(later - earlier >= WINDOW for earlier, later in itertools.pairwise(changes))
