import itertools

from hypothesis import given
from hypothesis import strategies as st

from qwhisper.guards.rate import CALM, DOWN, LEAST, UP, WINDOW, DynamicRate


def observed(peaks) -> list[float]:
    rate, factors = DynamicRate(), []
    for peak in peaks:
        rate.observe(peak)
        factors.append(rate.factor)
    return factors


def test_one_peak_changes_nothing_and_two_within_a_window_bring_it_down_once():
    assert set(observed([False] * WINDOW + [True] + [False] * WINDOW + [True])) == {1.0}
    factors = observed([False] * WINDOW + [True, True, True, True])
    assert factors[-4:] == [1.0, DOWN, DOWN, DOWN]


def test_it_comes_back_to_one_when_they_are_over():
    factors = observed([False] * WINDOW + [True, True] + [False] * (CALM + 4 * WINDOW))
    first_up = factors.index(DOWN * UP)
    assert first_up == WINDOW + 1 + CALM and factors[-1] == 1.0
    assert all(before <= after for before, after in zip(factors[first_up:], factors[first_up + 1 :], strict=False))


@given(st.lists(st.booleans(), max_size=400))
def test_it_stays_within_its_bounds_and_never_changes_twice_in_a_window(peaks):
    factors = observed(peaks)
    assert all(LEAST <= factor <= 1.0 for factor in factors)
    changes = [n for n in range(1, len(factors)) if factors[n] != factors[n - 1]]
    assert all(later - earlier >= WINDOW for earlier, later in itertools.pairwise(changes))
