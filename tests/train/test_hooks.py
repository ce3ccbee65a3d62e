"""Trackers' callbacks: what they do wrong is theirs, and a run is one run to them however often it is resumed."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from qwhisper.train import hf as hooks
from qwhisper.train.run import main
from tests.test_faults.inject import outcome_of


def tracker_that(act) -> type[TrainerCallback]:
    return type("Leaves", (TrainerCallback,), {"on_log": lambda self, *shown, **values: act()})


def leave():
    sys.exit("login needed")


def interrupt():
    raise KeyboardInterrupt


def test_a_tracker_that_exits_is_named_and_left_out(arguments, monkeypatch, capsys):
    monkeypatch.setattr(hooks, "get_reporting_integration_callbacks", lambda names: [tracker_that(leave)])
    assert outcome_of(arguments(report_to=["broken"])).code == 0
    assert capsys.readouterr().err.count("Leaves failed in on_log (SystemExit: login needed)") == 1


def test_ctrl_c_in_a_tracker_is_not_the_trackers():
    with pytest.raises(KeyboardInterrupt):
        hooks.Tracker(tracker_that(interrupt)()).on_log()


def test_a_resumed_run_is_one_run_in_tensorboard_and_steps_taken_again_are_shown_once(arguments, train_file):
    args = arguments(report_to=["tensorboard"], eval_file=str(train_file), max_steps=5, save_steps=3, eval_steps=3)
    folder = Path(args.output_dir)
    assert main(args) == 0
    again = dataclasses.replace(args, resume_from_checkpoint=str(folder / "checkpoint-3"), max_steps=6)
    assert main(again) == 0

    assert [path.parent.name for path in folder.rglob("events.out.tfevents.*")] == ["tensorboard"] * 2
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = shown.Scalars("train/loss")
    assert [point.step for point in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1].wall_time > losses[3].wall_time > losses[2].wall_time
    assert {"train/grad_norm_lora", "train/grad_norm_projector", "train/grad_norm"} <= set(shown.Tags()["scalars"])
    assert [point.step for point in shown.Scalars("eval/loss")] == [0, 3, 6]


def test_trackers_that_know_runs_by_an_id_are_told_that_of_the_run(arguments, monkeypatch):
    told = []

    class Asks(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            told.append((os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"], os.environ["SWANLAB_RUN_ID"]))

    args = arguments(max_steps=2)
    assert main(args, [Asks()]) == 0
    assert main(dataclasses.replace(args, resume_from_checkpoint="latest", max_steps=3), [Asks()]) == 0
    assert told[0] == told[1] and told[0][1] == "allow" and "WANDB_RUN_ID" not in os.environ
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert main(dataclasses.replace(args, output_dir=f"{args.output_dir}-2"), [Asks()]) == 0
    assert told[2][0] == "mine" and told[2][2] not in (told[0][2], "mine") and os.environ["WANDB_RUN_ID"] == "mine"
