import dataclasses
import json
import math

import pytest

from qwhisper.guards.decide import Decision, StepStatistics
from qwhisper.guards.state import ALL, SNAPSHOT_STEPS, GuardState
from qwhisper.typed_json import from_json

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
