"""Tables for the pure part of the guards."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwhisper.guards.decide import clip_factor, decide


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        ({"loss": math.nan, "lora": 1.0}, "loss not finite"),
        ({"loss": math.inf, "lora": 1.0}, "loss not finite"),
        ({"loss": 1.0, "lora": math.inf, "projector": 2.0}, "gradient of lora not finite"),
        ({"loss": math.nan, "lora": 1.0, "projector": math.nan}, "loss and gradient of projector not finite"),
    ],
)
def test_non_finite_numbers_skip_the_step_and_reach_no_factor(statistics, reason):
    decision = decide(statistics, group_bounds={"lora": 5.0}, max_grad_norm=1.0)
    assert decision.skip == reason and decision.factors == {}


norms = st.floats(0, 1e6, allow_nan=False)
bounds = st.sampled_from([0.0, 1e-3, 1.0, 5.0, 1e3])


@given(lora=norms, projector=norms, lora_bound=bounds, total=bounds)
def test_norms_after_clipping_keep_every_bound(lora, projector, lora_bound, total):
    decision = decide(
        {"loss": 1.0, "lora": lora, "projector": projector}, group_bounds={"lora": lora_bound}, max_grad_norm=total
    )
    after = {
        "lora": lora * decision.factors.get("lora", 1.0),
        "projector": projector * decision.factors.get("projector", 1.0),
    }
    slack = 1 + 1e-12  # a few double roundings
    assert decision.skip is None and decision.grad_norm == pytest.approx(math.hypot(lora, projector))
    assert not lora_bound or after["lora"] <= lora_bound * slack
    assert not total or math.hypot(*after.values()) <= total * slack
    assert all(0 < factor <= 1 for factor in decision.factors.values())


def test_within_the_bounds_nothing_is_scaled():
    assert (
        decide({"loss": 1.0, "lora": 0.5, "projector": 0.5}, group_bounds={"lora": 5.0}, max_grad_norm=1.0).factors
        == {}
    )


@pytest.mark.parametrize(
    ("norm", "bound", "factor"), [(2.0, 1.0, 0.5), (1.0, 2.0, 1.0), (3.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
)
def test_clip_factor(norm, bound, factor):
    assert clip_factor(norm, bound) == factor
