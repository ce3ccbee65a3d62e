"""Tables of facts in, alarms out."""

import dataclasses
import json
import math
import random

import pytest

from qwhisper.guards.alarms import (
    FORGETTING,
    HEARS,
    MEMORISED_LOSS,
    SHIFT_BOUND,
    STEPS_UNTIL_MOVED,
    STEPS_WITHOUT_GRADIENT,
    WEIGHTS_EVERY,
    Alarms,
    StepFacts,
)

GROUPS = ("lora", "projector")


def facts(step: int = 1, **values) -> StepFacts:
    """Those of a step in which all is well."""
    well = {
        "loss": 2.0,
        "tokens": 12,
        "num_samples": 4,
        "has_audio": True,
        "skipped": False,
        "group_norms": dict.fromkeys(GROUPS, 0.7),
        "learning_rates": dict.fromkeys(GROUPS, 3e-5),
    }
    return StepFacts(step=step, **well | values)


def names(raised) -> list[str]:
    return [f"{alarm.kind}/{alarm.about}".rstrip("/") for alarm in raised]


def observe_all(alarms: Alarms, *several: StepFacts) -> list[str]:
    return [name for each in several for name in names(alarms.observe(each))]


ZERO = {"lora": 0.7, "projector": 0.0}
DEAF = {"listening_gain": 0.01, "listening_noise": 0.02}
HEARING = {"listening_gain": 1.0, "listening_noise": 0.1}
KEPT = HEARING | {"hearing": 0.9, "retention": 0.8, "retention_questions": 32}
LOST = KEPT | {"retention": 0.1}
SAME_TEXT = HEARING | {"text_shift": 0.01}
MOVED = SAME_TEXT | {"text_shift": SHIFT_BOUND + 0.1}
STILL = {"weight_checksums": dict.fromkeys(GROUPS, 5)}


@pytest.mark.parametrize(
    ("bad", "steps", "alarm"),
    [
        ({"loss": 0.0}, 1, ["loss_zero"]),
        ({"tokens": 0}, 1, ["labels_masked"]),
        ({"tokens": 0, "skipped": True, "loss": math.nan}, 1, ["labels_masked"]),
        ({"group_norms": ZERO}, STEPS_WITHOUT_GRADIENT, ["gradient_zero/projector"]),
        (
            {"group_norms": dict.fromkeys(GROUPS, 0.0)},
            STEPS_WITHOUT_GRADIENT,
            ["gradient_zero/lora", "gradient_zero/projector"],
        ),
        (STILL, STEPS_UNTIL_MOVED + 1, ["not_moving/lora", "not_moving/projector"]),
        ({"changed_weights": ["layers.0.q_proj.weight", "norm.weight"]}, 1, ["base_changed"]),
        (DEAF, 1, ["not_listening"]),
        ({"listening_gain": 0.0, "listening_noise": 0.0}, 1, ["not_listening"]),
        ({"listening_gain": -3.0, "listening_noise": 0.1}, 1, ["not_listening"]),
        (LOST, 1, ["forgetting"]),
        (MOVED, 1, ["forgetting"]),
        (KEPT | MOVED, 1, ["forgetting"]),
        (SAME_TEXT | LOST, 1, ["forgetting"]),
        # 0 of 8; and 0.1 + 2 standard errors of 0.053 is below half of 0.7
        (LOST | {"retention": 0.0, "retention_questions": 8}, 1, ["forgetting"]),
        (LOST | {"hearing": HEARS}, 1, ["forgetting"]),
    ],
)
def test_each_fault_raises_its_alarm_once_in_time_and_again_after_it_has_cleared(bad, steps, alarm):
    alarms = Alarms()
    well = {"weight_checksums": {}, "changed_weights": [], **KEPT, **SAME_TEXT}
    assert observe_all(alarms, *(facts(n, **bad) for n in range(steps - 1))) == []
    assert observe_all(alarms, facts(steps, **bad)) == alarm
    assert observe_all(alarms, *(facts(steps + n, **bad) for n in range(1, 50))) == []
    if "weight_checksums" in bad:
        well["weight_checksums"] = dict.fromkeys(GROUPS, 6)
    assert observe_all(alarms, facts(100, **well)) == [] and alarms.active == []
    assert observe_all(alarms, *(facts(101 + n, **bad) for n in range(steps))) == alarm


@pytest.mark.parametrize(
    "harmless",
    [
        {"group_norms": ZERO, "has_audio": False},  # text-only steps
        {"group_norms": ZERO | {"encoder": 0.0}, "has_audio": False},
        {"group_norms": ZERO, "frozen": frozenset({"projector"})},
        {"group_norms": ZERO, "skipped": True},
        {"group_norms": dict.fromkeys(GROUPS, math.nan), "skipped": True, "loss": math.nan},
        {"tokens": 0, "num_samples": 0, "loss": 0.0, "skipped": True},  # no sample was left
        {"learning_rates": dict.fromkeys(GROUPS, 0.0)} | STILL,
        {"skipped": True} | STILL,
        {"group_norms": {"lora": 0.7}, "frozen": frozenset({"lora"})} | STILL,
        {"listening_gain": 0.3, "listening_noise": 0.1},
        {"listening_gain": math.nan, "listening_noise": 0.1},
        {"listening_gain": 0.0, "listening_noise": math.inf},
        {"changed_weights": []},
        KEPT | SAME_TEXT,
        LOST | DEAF | {"listening_gain": None},
        LOST | {"listening_gain": math.nan},
        LOST | {"hearing": HEARS - 0.01},  # what is wrong may not have been heard
        LOST | {"hearing": None},
        LOST | {"retention": None},
        KEPT | {"retention": 0.375, "retention_questions": 16},  # 2 standard errors are 0.24
        MOVED | {"text_shift": math.nan},
        MOVED | {"text_shift": SHIFT_BOUND},
        MOVED | {"hearing": 0.3},
    ],
)
def test_what_is_meant_raises_no_alarm(harmless):
    assert observe_all(Alarms(), *(facts(n, **harmless) for n in range(200))) == []


def test_text_only_steps_between_neither_raise_nor_excuse():
    alarms = Alarms()
    text = facts(group_norms=ZERO, has_audio=False)
    audio = facts(group_norms=ZERO)
    assert observe_all(alarms, audio, text, text, audio, text) == []
    assert observe_all(alarms, audio) == ["gradient_zero/projector"]


def test_two_steps_without_gradient_are_not_three_in_a_row():
    zero, well = facts(group_norms=ZERO), facts()
    assert observe_all(Alarms(), *[zero, zero, well] * 20) == []


def test_a_memorised_answer_may_reach_a_loss_of_exactly_0():
    alarms = Alarms()
    assert observe_all(alarms, facts(loss=MEMORISED_LOSS / 2), facts(loss=0.0), facts(loss=0.0)) == []
    assert observe_all(alarms, facts(loss=4.05), facts(loss=0.0)) == ["loss_zero"]


def test_on_text_the_teachers_own_answer_has_a_loss_of_exactly_0():
    same = {"loss": 0.0, "divergence": 0.0}
    assert observe_all(Alarms(), facts(**same, has_audio=False)) == []
    assert observe_all(Alarms(), facts(**same)) == ["loss_zero"]
    assert observe_all(Alarms(), facts(loss=0.0, has_audio=False)) == ["loss_zero"]


def test_a_loss_of_0_is_not_told_twice_as_a_gradient_of_0():
    zero = facts(loss=0.0, group_norms=dict.fromkeys(GROUPS, 0.0))
    assert observe_all(Alarms(), *[zero] * 10) == ["loss_zero"]


def test_weights_are_judged_by_the_steps_that_should_have_moved_them():
    alarms = Alarms()
    look = facts(weight_checksums={"projector": 5})
    without_audio = [facts(group_norms=ZERO, has_audio=False)] * 100
    assert observe_all(alarms, look, *without_audio, look) == []
    assert observe_all(alarms, *[facts()] * STEPS_UNTIL_MOVED, look) == ["not_moving/projector"]


def test_a_rewind_that_puts_the_same_weights_back_is_no_standstill():
    alarms = Alarms()
    look = facts(**STILL)
    assert observe_all(alarms, look, *[facts()] * 20) == []
    alarms.forget_weights()
    assert observe_all(alarms, look, look) == []


def test_weights_are_asked_for_at_the_start_and_then_now_and_then():
    alarms = Alarms()
    assert alarms.wants_weights(1)
    alarms.observe(facts(**STILL))
    assert [step for step in range(1, 3 * WEIGHTS_EVERY) if alarms.wants_weights(step)] == [
        WEIGHTS_EVERY,
        2 * WEIGHTS_EVERY,
    ]


@pytest.mark.parametrize("bad", [{"group_norms": ZERO}, STILL, DEAF, LOST, {"loss": 0.0}])
def test_state_goes_on_from_json_as_if_nothing_had_been(bad):
    for cut in range(1, STEPS_UNTIL_MOVED + 3):
        through, resumed = Alarms(), Alarms()
        steps = [facts(n, **bad) for n in range(STEPS_UNTIL_MOVED + 4)]
        raised = observe_all(resumed, *steps[:cut])
        resumed = Alarms(**json.loads(json.dumps(dataclasses.asdict(resumed))))
        raised += observe_all(resumed, *steps[cut:])
        assert raised == observe_all(through, *steps) and raised
        assert resumed == through


def test_forgetting_is_as_many_standard_errors_below_its_share_of_hearing_as_asked_for():
    for count in (8, 16, 32, 200):
        silent = [n for n in range(count + 1) if not Alarms().observe(facts(**lost(n, count)))]
        assert silent == list(range(silent[0], count + 1))
        share = silent[0] / count
        bound = FORGETTING * 0.9
        assert share + 2 * math.sqrt(share * (1 - share) / count) >= bound
        share -= 1 / count
        assert share + 2 * math.sqrt(share * (1 - share) / count) < bound


def lost(right: int, count: int) -> dict:
    return LOST | {"retention": right / count, "retention_questions": count}


def test_who_went_deaf_has_not_remembered():
    alarms = Alarms()
    assert observe_all(alarms, facts(1, **LOST)) == ["forgetting"]
    assert observe_all(alarms, facts(2, **LOST | DEAF)) == ["not_listening"]
    assert alarms.active == ["forgetting/", "not_listening/"]
    assert observe_all(alarms, facts(3, **LOST)) == [] and alarms.active == ["forgetting/"]
    assert observe_all(alarms, facts(4, **KEPT)) == [] and alarms.active == []


def test_messages_say_what_where_and_what_to_do():
    masked = Alarms().observe(facts(17, tokens=0))[0].message
    assert "4 samples of step 17" in masked and "data check" in masked
    base = Alarms().observe(facts(17, changed_weights=["model.layers.0.q_proj.weight"]))[0].message
    assert "model.layers.0.q_proj.weight" in base and "step 17" in base
    deaf = Alarms().observe(facts(640, **DEAF))[0].message
    assert "step 640" in deaf and "0.0100 ± 0.0200 nats" in deaf
    assert all(advice in deaf for advice in ("transcripts", "--projector_learning_rate 1e-3", "--no_use_lora"))
    lost = Alarms().observe(facts(820, **LOST | MOVED))[0].message
    assert lost.startswith("it hears, but is forgetting, found at step 820: 10% of 32 questions")
    assert "90% of trained kinds" in lost and "0.20 nats" in lost
    assert all(advice in lost for advice in ("--distill_weight 0.5", "--no_use_lora", "data answer"))
    alarms = Alarms()
    still = [alarm for n in range(STEPS_UNTIL_MOVED + 1) for alarm in alarms.observe(facts(n, **STILL))]
    assert "3e-05" in still[0].message and "10 steps" in still[0].message


def test_a_clean_run_of_10_000_steps_raises_nothing():
    """Text-only steps, steps without a sample, skipped ones, a frozen start, a cosine to 0, one probe in 500."""
    draw, alarms = random.Random(0), Alarms()
    for step in range(10_000):
        has_audio, skipped = draw.random() < 0.7, draw.random() < 0.01
        frozen = frozenset({"projector"} if step < 20 else ())
        no_gradient = "projector" in frozen or not has_audio
        rate = 3e-5 * 0.5 * (1 + math.cos(math.pi * step / 10_000))
        looked = {name: draw.getrandbits(64) for name in GROUPS} if alarms.wants_weights(step) else {}
        probe = {}
        if step % 500 == 499:
            probe = KEPT | SAME_TEXT | {"listening_gain": draw.gauss(0.5, 0.05), "listening_noise": 0.05}
        raised = alarms.observe(
            facts(
                step,
                loss=math.nan if skipped else draw.uniform(0.01, 3),
                has_audio=has_audio,
                skipped=skipped,
                group_norms={"lora": draw.uniform(0.01, 9), "projector": 0.0 if no_gradient else draw.uniform(1e-6, 2)},
                learning_rates=dict.fromkeys(GROUPS, rate),
                frozen=frozen,
                weight_checksums=looked,
                changed_weights=[] if step % 200 == 0 else None,
                **probe,
            )
        )
        assert raised == []
    assert alarms.active == []
