"""Tables for the pure part of the guards."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.guards.decide import BAD, FIRST_NORMS, PEAK, SPIKE, NormAverage, StepStatistics, clip_factor, decide


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
