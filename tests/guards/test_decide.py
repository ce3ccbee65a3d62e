"""Tables for the pure part of the guards."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.guards.decide import BAD, BETA, FIRST_NORMS, PEAK, SPIKE, NormAverage, StepStatistics, clip_factor, decide


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


def average(mean: float) -> NormAverage:
    return NormAverage(mean=mean, first=[mean] * FIRST_NORMS)


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        (StepStatistics(math.nan, {"lora": 1.0}), "loss not finite"),
        (StepStatistics(math.inf, {"lora": 1.0}), "loss not finite"),
        (StepStatistics(1.0, {"lora": math.inf, "projector": 2.0}), "gradient of lora not finite"),
        (
            StepStatistics(math.nan, {"lora": 1.0, "projector": math.nan}),
            "loss and gradient of projector not finite",
        ),
        (StepStatistics(1.0, {"lora": 1.0}, {"lora": math.nan}), "weights of lora not finite"),
    ],
)
def test_non_finite_numbers_skip_the_step_and_reach_no_factor(statistics, reason):
    decision = decide(statistics, {"lora": average(1.0)}, group_bounds={"lora": 5.0}, max_grad_norm=1.0)
    assert decision.skip == reason and decision.factors == {} and decision.peaks == {} and decision.bad


norms = st.floats(0, 1e12, allow_nan=False)
bounds = st.sampled_from([0.0, 1e-3, 1.0, 5.0, 1e3])
means = st.sampled_from([1e-3, 1.0, 1e3])


@given(lora=norms, projector=norms, lora_bound=bounds, total=bounds, mean=means)
def test_norms_after_clipping_keep_every_bound(lora, projector, lora_bound, total, mean):
    statistics = StepStatistics(1.0, {"lora": lora, "projector": projector})
    decision = decide(statistics, {"projector": average(mean)}, group_bounds={"lora": lora_bound}, max_grad_norm=total)
    after = {
        "lora": lora * decision.factors.get("lora", 1.0),
        "projector": projector * decision.factors.get("projector", 1.0),
    }
    slack = 1 + 1e-12  # a few double roundings
    assert decision.skip is None and decision.grad_norm == pytest.approx(math.hypot(lora, projector))
    assert not lora_bound or after["lora"] <= lora_bound * slack
    assert after["projector"] <= PEAK * mean * slack
    assert not total or math.hypot(*after.values()) <= total * slack
    assert all(0 < factor <= 1 for factor in decision.factors.values())


def test_within_the_bounds_nothing_is_scaled():
    statistics = StepStatistics(1.0, {"lora": 0.5, "projector": 0.5})
    averages = {"lora": average(0.4), "projector": average(0.4)}
    decision = decide(statistics, averages, group_bounds={"lora": 5.0}, max_grad_norm=1.0)
    assert decision.factors == {} and decision.peaks == {} and not decision.bad


@pytest.mark.parametrize(
    ("times", "peak", "bad"), [(1.0, False, False), (PEAK * 1.01, True, False), (PEAK * BAD * 1.01, True, True)]
)
def test_a_norm_above_its_average_is_a_peak_and_far_above_it_a_bad_step(times, peak, bad):
    decision = decide(
        StepStatistics(1.0, {"lora": 2.0 * times}), {"lora": average(2.0)}, group_bounds={}, max_grad_norm=0
    )
    assert decision.peaks == ({"lora": pytest.approx(times)} if peak else {})
    assert decision.bad == bad and decision.skip is None


@pytest.mark.parametrize(("times_largest", "spiked"), [(SPIKE * 0.99, False), (SPIKE * 1.01, True)])
def test_far_above_its_average_and_above_the_largest_lately_it_is_a_spike(times_largest, spiked):
    known = NormAverage(mean=2.0, first=[2.0] * FIRST_NORMS, largest=2.0 * PEAK * BAD)
    statistics = StepStatistics(1.0, {"lora": known.largest * times_largest, "projector": 1.0})
    decision = decide(statistics, {"lora": known}, group_bounds={}, max_grad_norm=0)
    assert decision.spikes == ({"lora": decision.peaks["lora"]} if spiked else {})
    assert decision.bad  # also where such norms are ordinary: five in a row are not


@pytest.mark.parametrize(
    ("norm", "bound", "factor"),
    [(2.0, 1.0, 0.5), (1.0, 2.0, 1.0), (3.0, 0.0, 1.0), (0.0, 1.0, 1.0), (3.0, math.inf, 1.0)],
)
def test_clip_factor(norm, bound, factor):
    assert clip_factor(norm, bound) == factor


def test_deciding_needs_no_torch():
    code = "import sys, qwhisper.guards.state, qwhisper.guards.decide; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
