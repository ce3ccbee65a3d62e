"""What the guards remember: the learning rate, the loss scale, and what follows bad steps."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.guards.decide import Decision, StepStatistics
from qwhisper.guards.state import ALL, GROWTH_STEPS, SNAPSHOT_STEPS, DynamicRate, GuardState, LossScale
from qwhisper.guards.state import LARGEST_SCALE as LARGEST
from qwhisper.guards.state import LOSSES_KNOWN as KNOWN
from qwhisper.guards.state import RATE_CALM as CALM
from qwhisper.guards.state import RATE_DOWN as DOWN
from qwhisper.guards.state import RATE_LEAST as LEAST
from qwhisper.guards.state import RATE_UP as UP
from qwhisper.guards.state import RATE_WINDOW as WINDOW
from qwhisper.guards.state import SMALLEST_SCALE as SMALLEST
from qwhisper.typed_json import from_json

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


def test_it_shrinks_to_one_and_says_when_it_can_no_more():
    scale, tries = LossScale(), 0
    while scale.shrink():
        tries += 1
    assert scale.scale == SMALLEST and 5 <= tries <= 12


def test_it_grows_again_after_steps_without_overflow_up_to_its_bound():
    scale = LossScale(scale=4.0)
    for _ in range(GROWTH_STEPS - 1):
        scale.step_taken()
    assert scale.scale == 4.0
    scale.step_taken()
    assert scale.scale == 8.0
    for _ in range(40 * GROWTH_STEPS):
        scale.step_taken()
    assert scale.scale == LARGEST


def test_an_overflow_starts_the_count_again():
    scale = LossScale(scale=16.0)
    for _ in range(GROWTH_STEPS - 1):
        scale.step_taken()
    scale.shrink()
    scale.step_taken()
    assert scale.scale == 4.0


FINE = StepStatistics(1.0, {"lora": 1.0, "projector": 0.0}, {"lora": 3.0})
GOOD = Decision(skip=None, grad_norm=1.0)
SKIPPED = Decision(skip="loss not finite", grad_norm=math.nan, bad=True)
FAR_ABOVE = Decision(skip=None, grad_norm=99.0, peaks={"lora": 99.0}, bad=True)
LIMITS = {"max_bad_steps": 3, "max_rewinds": 2}


def after(*decisions: Decision, state: GuardState | None = None) -> GuardState:
    state = state or GuardState()
    for decision in decisions:
        state.feed(FINE, decision)
    return state


def test_averages_are_fed_by_steps_that_were_taken_and_groups_that_had_gradients():
    state = after(GOOD, SKIPPED, FAR_ABOVE)
    assert state.averages.keys() == {"lora", ALL}
    assert state.averages["lora"].first == [1.0, 1.0] and state.averages[ALL].first == [1.0, 99.0]


@pytest.mark.parametrize(
    ("decisions", "act"),
    [
        ([SKIPPED, SKIPPED], "go on"),
        ([SKIPPED, SKIPPED, GOOD, SKIPPED], "go on"),
        ([SKIPPED, FAR_ABOVE, SKIPPED], "rewind"),
    ],
)
def test_bad_steps_in_a_row_lead_to_a_rewind(decisions, act):
    assert after(*decisions).next_act(FINE, **LIMITS) == act


def test_weights_that_are_not_finite_do_not_wait_for_more_bad_steps():
    broken = StepStatistics(math.nan, {"lora": math.nan}, {"lora": math.nan})
    assert GuardState().next_act(broken, **LIMITS) == "rewind"


def test_each_rewind_halves_the_rate_and_after_the_last_the_run_stops():
    state = GuardState()
    for rate in (0.5, 0.25):
        after(SKIPPED, SKIPPED, SKIPPED, state=state)
        assert state.next_act(FINE, **LIMITS) == "rewind"
        state.rewound()
        assert state.lr_factor == rate and state.bad_steps_in_a_row == 0
    after(SKIPPED, SKIPPED, SKIPPED, state=state)
    assert state.next_act(FINE, **LIMITS) == "stop"


def test_a_snapshot_is_due_after_enough_clean_steps():
    state = after(*[GOOD] * (SNAPSHOT_STEPS - 1), SKIPPED, FAR_ABOVE)
    assert not state.snapshot_due
    assert after(GOOD, state=state).snapshot_due


def test_it_survives_json():
    state = after(*[GOOD] * 30, SKIPPED)
    state.rate.observe(1.0, True)
    state.loss_scale.shrink()
    assert from_json(GuardState, json.loads(json.dumps(dataclasses.asdict(state)))) == state
