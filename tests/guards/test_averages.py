import math

import numpy as np
import pytest

from qwhisper.guards.decide import BAD, BETA, FIRST_NORMS, PEAK, SPIKE, NormAverage


def fed(norms) -> NormAverage:
    average = NormAverage()
    for norm in norms:
        average.feed(norm)
    return average


def test_there_is_no_bound_before_enough_norms_were_seen():
    assert fed([1.0] * (FIRST_NORMS - 1)).bound == math.inf
    assert fed([1.0] * FIRST_NORMS).bound == PEAK


def test_a_peak_among_the_first_norms_does_not_decide_the_average():
    norms = [1e12] + [1.0 + 0.01 * n for n in range(FIRST_NORMS - 1)]
    assert 1.0 <= fed(norms).mean <= 1.2


@pytest.mark.parametrize("peak", [1e1, 1e6, 1e12])
def test_a_peak_moves_the_average_no_more_than_its_bound_does(peak):
    average = fed([1.0] * FIRST_NORMS)
    average.feed(peak)
    assert average.mean == pytest.approx(1.0 + (1 - BETA) * (PEAK - 1.0))


def test_there_is_no_spike_before_enough_norms_were_seen():
    assert fed([1.0] * (FIRST_NORMS - 1)).spike_bound == math.inf


def test_a_norm_that_was_ordinary_lately_is_no_spike_and_in_time_it_is_again():
    """Hard samples among known ones, up to a thousand times the others: in sound runs it was up to 931."""
    average = fed([1.0] * FIRST_NORMS)
    for norm in (20.0, 150.0, 1000.0):
        assert PEAK * average.mean < norm <= average.spike_bound
        average.feed(norm)
    assert average.spike_bound == SPIKE * 1000.0
    for _ in range(1000):
        average.feed(1.0)
    assert average.spike_bound == pytest.approx(SPIKE * 1000.0 / 2)


@pytest.mark.parametrize("spike", [1e3, 1e12])
def test_spikes_hide_no_spike_after_them(spike):
    average = fed([1.0] * FIRST_NORMS)
    for _ in range(5):
        assert spike > average.spike_bound
        average.feed(spike)
    assert average.spike_bound < 2 * BAD * PEAK
    assert fed([spike] + [1.0] * (FIRST_NORMS - 1)).spike_bound <= SPIKE * BAD * PEAK


def test_mean_and_variance_are_those_of_the_norms():
    """Norms uniform in [0.5, 1.5]: mean 1, variance 1/12; what BETA remembers has a deviation of 3 %."""
    average = fed(np.random.default_rng(0).uniform(0.5, 1.5, 2000).tolist())
    remembered = (1 + BETA) / (1 - BETA)  # independent norms that weigh as much
    assert average.mean == pytest.approx(1.0, abs=4 * math.sqrt(1 / 12 / remembered))
    assert average.variance == pytest.approx(1 / 12, rel=0.4)


def test_a_lasting_rise_is_followed_in_about_a_hundred_steps():
    average = fed([1.0] * FIRST_NORMS + [10.0] * 100)
    assert average.bound > 10.0
