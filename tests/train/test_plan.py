"""What the plan decides, and the schedule, with the careful steps at its beginning."""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from qwhisper.errors import UsageError
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.optimizer import learning_rate_factor
from qwhisper.train.plan import Plan, resolve
from qwhisper.train.resume import saved_arguments
from qwhisper.train.run import main


def plan_of(args, total_steps, saved=None) -> Plan:
    return resolve(dataclasses.replace(args, max_steps=total_steps), num_dialogues=1, saved=saved)


def factor(step, args, total_steps) -> float:
    return learning_rate_factor(step, args, plan_of(args, total_steps))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.2), (99, 0.2), (100, 1.0), (500, 1.0)])
def test_early_factor_holds_for_its_steps_and_no_longer(arguments, step, expected):
    args = arguments(early_lr_factor=0.2, early_lr_steps=100, lr_scheduler_type="constant")
    assert factor(step, args, 1000) == expected


def test_schedules_end_at_zero_and_warm_up_linearly(arguments):
    linear = arguments(early_lr_steps=0, lr_scheduler_type="linear", warmup_steps=10)
    assert [factor(s, linear, 110) for s in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])
    cosine = arguments(early_lr_steps=0, lr_scheduler_type="cosine", warmup_steps=0.1)
    assert factor(10, cosine, 100) == 1.0
    assert factor(55, cosine, 100) == pytest.approx(0.5)
    assert factor(40, cosine, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert factor(100, cosine, 100) == pytest.approx(0)


@pytest.mark.parametrize(
    ("steps", "early", "frozen"), [(2, 0, 0), (90, 9, 1), (999, 99, 19), (1000, 100, 20), (10**6, 100, 20)]
)
def test_careful_steps_that_were_not_given_are_a_share_of_a_short_run(arguments, steps, early, frozen):
    plan = plan_of(arguments(early_lr_steps=None, freeze_projector_steps=None), steps)
    assert (plan.early_lr_steps, plan.freeze_projector_steps) == (early, frozen)
    capped = [f"--early_lr_steps is {early}: its default of 100, at most 10 % of {steps} steps"] * (early < 100)
    capped += [f"--freeze_projector_steps is {frozen}: its default of 20, at most 2 % of {steps} steps"] * (frozen < 20)
    assert list(plan.notes) == capped


def test_careful_steps_that_were_given_are_kept_in_a_run_of_any_length(arguments):
    plan = plan_of(arguments(early_lr_steps=100, freeze_projector_steps=20), 6)
    assert (plan.early_lr_steps, plan.freeze_projector_steps, plan.notes) == (100, 20, ())


def test_without_lora_the_projector_learns_from_the_first_step(arguments):
    plan = plan_of(arguments(use_lora=False, freeze_projector_steps=None), 10_000)
    assert plan.freeze_projector_steps == 0


@pytest.mark.parametrize("saved", [{"early_lr_steps": 100, "freeze_projector_steps": 20}, {"early_lr_steps": 3}])
def test_a_resumed_run_has_the_careful_steps_that_it_began_with(arguments, saved):
    plan = plan_of(arguments(early_lr_steps=None, freeze_projector_steps=None), 300, saved)
    assert (plan.early_lr_steps, plan.freeze_projector_steps) == (
        saved["early_lr_steps"],
        saved.get("freeze_projector_steps", 6),
    )


def test_a_run_of_more_epochs_resumed_keeps_its_schedule_and_a_new_one_from_its_config_has_its_own(arguments, capsys):
    args = arguments(early_lr_steps=None, freeze_projector_steps=None, max_steps=10, save_steps=100)
    assert main(args) == 0
    assert "note: --early_lr_steps is 1:" in capsys.readouterr().out
    assert main(dataclasses.replace(args, resume_from_checkpoint="latest", max_steps=12)) == 0
    said = capsys.readouterr().out
    assert "--max_steps 12 (was 10)" in said and "early_lr_steps" not in said.split("done:")[0]
    config = yaml.safe_load((Path(args.output_dir) / "config.yaml").read_text())
    assert plan_of(TrainArguments(**config | {"output_dir": "another"}), 5000).early_lr_steps == 100
    saved = saved_arguments(Path(args.output_dir) / "checkpoint-12")
    assert (saved["early_lr_steps"], saved["freeze_projector_steps"]) == (1, 0)


@pytest.mark.parametrize(("warmup", "refused"), [(1e9, True), (901, True), (900, False), (0.5, False)])
def test_a_warm_up_that_the_run_is_far_too_short_for_is_refused(arguments, warmup, refused):
    with pytest.raises(UsageError, match="--warmup_steps") if refused else nullcontext():
        plan_of(arguments(warmup_steps=warmup), 90)
