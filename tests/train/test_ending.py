"""What a run says of its learning at its end, and the course of it in events.jsonl."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest

from qwhisper.checkpoint.folders import checkpoints
from qwhisper.engine import executor
from qwhisper.errors import DataError, NothingLearnedError
from qwhisper.model.bases import LoadOptions
from qwhisper.train import session
from qwhisper.train.ending import device_name
from qwhisper.train.learning import SHORTEST
from qwhisper.train.run import main
from qwhisper.train.state import TrainState
from tests.small import teach_to_read, write_dialogues, write_small_bases
from tests.test_faults.lives import At
from tests.train.helpers import read_lines


def course(args) -> list[dict]:
    events = read_lines(Path(args.output_dir) / "events.jsonl")
    return [event for event in events if event["kind"] in ("begin", "resumed", "end")]


def test_a_run_without_an_act_of_a_guard_has_its_begin_its_resumes_and_its_ends(arguments):
    args = arguments(max_steps=3)
    stop = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(args, [stop]) == 128 + signal.SIGTERM
    assert main(dataclasses.replace(args, resume_from_checkpoint="latest")) == 0
    begin, stopped, resumed, end = course(args)
    assert (begin["kind"], begin["step"], begin["total_steps"], begin["device"]) == (
        "begin",
        0,
        3,
        device_name(LoadOptions().device),
    )
    assert begin["torch"] and begin["transformers"] and begin["qwhisper"] and begin["text_model"] == args.text_model
    assert begin["device"] != "cpu" or begin["why_plain"].startswith("the model is on cpu")
    assert (stopped["kind"], stopped["step"], stopped["exit_code"]) == ("end", 2, 143)
    assert (resumed["kind"], resumed["step"], resumed["run_id"]) == ("resumed", 2, begin["run_id"])
    assert resumed["checkpoint"].endswith("checkpoint-2")
    assert (end["kind"], end["step"], end["exit_code"], end["reason"]) == ("end", 3, 0, "done")
    assert end["supervised_tokens"] > stopped["supervised_tokens"] > 0


def test_a_run_that_ends_in_an_error_says_which(arguments, tmp_path):
    data = write_dialogues(tmp_path / "data", 12)
    (tmp_path / "data/clip3.wav").write_bytes(b"no sound")
    args = arguments(train_file=str(data), max_bad_fraction=0.01)
    with pytest.raises(DataError):
        main(args)
    end = course(args)[-1]
    assert (end["kind"], end["exit_code"]) == ("end", 3) and end["reason"].startswith("DataError: 1 times a dialogue")


def crash(*given):
    raise RuntimeError("a bug")


def test_a_crash_and_memory_that_runs_out_leave_an_end_as_well(arguments, monkeypatch):
    monkeypatch.setattr(executor.Executor, "forward_backward", crash)
    args = arguments()
    with pytest.raises(RuntimeError):
        main(args)
    assert (course(args)[-1]["exit_code"], course(args)[-1]["reason"]) == (1, "RuntimeError: a bug")


def test_a_rate_that_kills_the_model_ends_with_exit_code_7_and_a_checkpoint(arguments, tmp_path):
    audio, text = write_small_bases(tmp_path)
    teach_to_read(text, ["low", "high"], num_steps=80)
    lines = [{"messages": [{"role": "user", "content": f"{word}Pitch?"}, {"role": "assistant", "content": word}]}
             for word in ("low", "high")] * 12  # fmt: skip
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"audio_model": str(audio), "text_model": str(text), "train_file": str(data), "learning_rate": 0.9}
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    args = arguments(**values, early_lr_steps=0, freeze_projector_steps=0, max_steps=24, save_steps=100, **one)
    with pytest.raises(NothingLearnedError, match=r"nothing was learned in 24 steps.* lower --learning_rate") as caught:
        main(args)
    assert caught.value.exit_code == 7 == course(args)[-1]["exit_code"]
    assert [path.name for path in checkpoints(Path(args.output_dir))] == ["checkpoint-24"]


@pytest.fixture
def probed_at_the_end(monkeypatch):
    """A run of any length and any batch has a listening probe after its last step."""
    monkeypatch.setattr(session, "shortest_probed", lambda **values: 1)


def test_a_rate_that_teaches_nothing_ends_with_exit_code_7(arguments, train_file, probed_at_the_end):
    values = {"eval_file": str(train_file), "max_steps": SHORTEST, "save_steps": 100, "logging_steps": 100}
    values |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    args = arguments(learning_rate=1e-9, early_lr_steps=0, **values)
    with pytest.raises(NothingLearnedError, match=r"held-out loss 5\.\d+ → 5\.\d+; .* more steps, a higher"):
        main(args)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_a_dry_run_is_a_success_and_says_that_it_is_too_short(arguments, capsys, steps):
    assert main(arguments(max_steps=steps, save_steps=100, learning_rate=1e-9)) == 0
    assert "oo few steps to tell whether it learns. No guard had to act" in capsys.readouterr().out


def test_a_run_that_learned_says_by_how_much_and_what_may_be_loosened(arguments, train_file, probed_at_the_end, capsys):
    args = arguments(max_steps=24, save_steps=24, logging_steps=100, eval_file=str(train_file))
    assert main(args) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    learning = TrainState.load(Path(args.output_dir) / "checkpoint-24").learning
    assert learning.first_held_out > 1.05 * learning.last_held_out and learning.probed == 24
    assert f"Held-out loss {learning.first_held_out:.3g} → {learning.last_held_out:.3g}; loss " in said
    assert f"listening gain {learning.gain:.3f} ± {learning.noise:.3f} nats a token" in said
    assert "No guard had to act: a larger --per_device_train_batch_size, fewer --early_lr_steps" in said


@pytest.mark.slow
def test_the_record_of_a_resumed_run_is_that_of_an_uninterrupted_one(arguments, train_file, tmp_path):
    whole = arguments(output_dir=str(tmp_path / "whole"), eval_file=str(train_file), max_steps=4)
    parts = arguments(output_dir=str(tmp_path / "parts"), eval_file=str(train_file), max_steps=4)
    assert main(whole) == 0
    main(parts, [At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest")) == 0
    records = [TrainState.load(Path(args.output_dir) / "checkpoint-4").learning for args in (whole, parts)]
    assert records[0] == records[1] and records[0].first_held_out and records[0].steps == 4


def test_losses_of_before_are_forgotten_where_what_they_are_of_has_changed(arguments):
    args = arguments(max_steps=1)
    main(args)
    main(dataclasses.replace(args, resume_from_checkpoint="latest", max_steps=2, train_on="all"))
    assert TrainState.load(Path(args.output_dir) / "checkpoint-2").learning.steps == 1
