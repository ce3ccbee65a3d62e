"""Whether a run has learned, by its numbers: what is certain, and what is left open."""

import dataclasses
import json
import math
import random

import pytest

from qwhisper.train.learning import DEAD_STEPS, FEWEST, SHORTEST, WINDOW, Learning, rank_test

GUESS = math.log(150_000)
START, MOVED = {"lora": 1, "projector": 2}, {"lora": 3, "projector": 2}


def after(losses, *, steps_per_pass=10**9, **values) -> Learning:
    record = Learning(weights=dict(START), **values)
    for step, loss in enumerate(losses, 1):
        record.observe(loss, 10, pass_ended=step % steps_per_pass == 0)
    return record


def noisy(count, seed, *, first=2.0, last=2.0, spread=0.3):
    draw = random.Random(seed)
    return [first + (last - first) * step / count + draw.gauss(0, spread) for step in range(count)]


def why(record, *, weights=MOVED, began_trained=False):
    return record.nothing(weights, guess=GUESS, began_trained=began_trained)


DEAF, HEARS = {"gain": 0.01, "noise": 0.02}, {"gain": 1.9, "noise": 0.2}


def test_weights_that_did_not_move_are_nothing_learned_after_one_step():
    assert "as it was" in why(after([2.0]), weights=START)
    assert why(after([2.0])) is None
    assert why(Learning(weights=START), weights=START) is None  # no step was taken


@pytest.mark.parametrize("steps", range(2, FEWEST))
def test_a_dry_run_is_never_failed_by_its_losses(steps):
    assert why(after([2.0 + step / 10 for step in range(steps)], **DEAF)) is None


@pytest.mark.parametrize("steps", [6, 12, 200])
def test_a_model_that_became_worse_than_guessing_is_dead_whatever_the_probe_says(steps):
    losses = [2.0] * (steps // 2) + [30.0] * (steps - steps // 2)
    assert "worse than guessing" in why(after(losses, **HEARS))
    assert why(after([*losses[:-1], 2.0], **HEARS)) is None  # the last of its steps is sound
    assert DEAD_STEPS <= 3


def test_a_model_that_begins_worse_than_guessing_is_not_dead():
    assert why(after([30.0] * 6)) is None


def test_a_loss_that_rises_is_nothing_learned_unless_the_model_hears():
    losses = noisy(60, 1, first=2.0, last=6.0)
    assert why(after(losses)) == "the loss rose" == why(after(losses), began_trained=True)
    assert why(after(losses, **HEARS)) is None


def test_a_run_that_died_at_once_is_not_said_to_learn_because_it_gets_less_bad():
    losses = [1.0, *[9.0] * 29, *[7.0] * 30]
    record = after(losses, steps_per_pass=15)
    assert (
        record.passes < 1 and record.direction() == "rose" and not record.learned() and why(record) == "the loss rose"
    )


def test_a_run_of_same_losses_is_nothing_learned_where_it_is_long_and_not_begun_from_another():
    flat = [2.0, 3.0, 1.0, 2.5] * 25
    assert why(after(flat, steps_per_pass=4)) == "the loss did not fall"
    assert why(after(flat, steps_per_pass=4), began_trained=True) is None
    assert "worth no more than its noise" in why(after(flat, steps_per_pass=4, **DEAF), began_trained=True)
    assert why(after(flat, steps_per_pass=4, **HEARS)) is None
    assert why(after(flat[: SHORTEST - 2], steps_per_pass=4, **DEAF)) is None


def test_a_fall_within_the_noise_of_other_samples_shows_on_the_same_samples():
    samples = noisy(20, 3)
    losses = [loss * (0.98**epoch) for epoch in range(5) for loss in samples]
    assert abs(rank_test(losses[:50], losses[50:])) < 3
    record = after(losses, steps_per_pass=20, **DEAF)
    assert record.direction() == "fell" and record.learned() and why(record) is None


def slow_fall(seed):
    """Of three passes over the same samples, by far less than they differ."""
    samples = noisy(30, seed)
    return [samples[step % 30] - 0.1 * step / 90 for step in range(90)]


def test_sound_runs_are_not_failed():
    failed = [
        seed
        for seed in range(300)
        if why(after(slow_fall(seed), steps_per_pass=30, **DEAF)) is not None
        or why(after(noisy(90, seed, first=0.2, last=0.2, spread=0.05)), began_trained=True) is not None
        or why(after(noisy(90, seed, first=2.0, last=0.4), **DEAF)) is not None
    ]
    assert failed == []


def test_the_held_out_loss_decides_where_there_is_one():
    flat = [2.0, 3.0, 1.0, 2.5] * 25
    learned = after(flat, steps_per_pass=4, first_held_out=2.3, last_held_out=0.4)
    assert why(learned) is None and learned.learned()
    same = after(flat, steps_per_pass=4, first_held_out=2.3, last_held_out=2.3)
    assert why(same) == "the loss did not fall" and not same.learned()


@pytest.mark.parametrize(("last", "learned"), [(2.9, False), (2.31, True)])
def test_a_training_loss_that_fell_is_not_learning_where_the_held_out_loss_rose(last, learned):
    record = after(noisy(100, 1, first=3.0, last=2.5), first_held_out=2.3, last_held_out=last)
    assert record.direction() == "fell" and why(record) is None
    assert (record.learned(), record.held_out_rose) == (learned, not learned)


def test_a_held_out_loss_that_is_no_number_any_more_is_a_dead_model():
    record = after([2.0] * 5)
    record.evaluated(2.3, before_first_step=True)
    record.evaluated(math.nan, before_first_step=False)
    assert "no longer a finite number" in why(record)
    record.evaluated(2.2, before_first_step=False)
    assert why(record) is None


def test_a_memorised_loss_that_wavers_has_not_risen():
    record = after([1e-4] * 50 + [2e-3] * 50, steps_per_pass=10)
    assert record.direction() == "flat" and why(record) is None


def test_a_run_that_was_not_followed_from_its_beginning_is_not_judged_by_its_losses():
    record = after([2.0, 3.0, 1.0, 2.5] * 25, steps_per_pass=4)
    record.weights = {}
    assert why(record) is None


def test_the_record_goes_through_json_and_on_as_if_uninterrupted():
    losses = noisy(3 * WINDOW, 5)
    whole = after(losses, steps_per_pass=7)
    parts = after(losses[:40], steps_per_pass=7)
    parts = Learning(**json.loads(json.dumps(dataclasses.asdict(parts))))
    for step, loss in enumerate(losses[40:], 41):
        parts.observe(loss, 10, pass_ended=step % 7 == 0)
    assert parts == whole and whole.first == losses[:WINDOW] and whole.last == losses[-WINDOW:]


def test_steps_that_were_not_taken_are_in_no_mean():
    record = after([2.0, 4.0], steps_per_pass=3)
    record.observe(math.nan, 0, pass_ended=True)
    assert (record.first_pass, record.last_pass, record.steps) == (3.0, None, 2)


def test_the_rank_test_is_that_of_mann_and_whitney():
    assert rank_test([1.0, 2.0], [3.0, 4.0]) == pytest.approx(2 / math.sqrt(2 * 2 * 5 / 12))
    assert rank_test([1.0, 2.0], [2.0, 1.0]) == 0 == rank_test([], [])
