"""Trackers that fail, logs that the disk does not take, and an output that nobody takes any more."""

import contextlib
import json
import os
import select
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from transformers import TrainerCallback

from qwhisper.checkpoint.reading import newest_usable
from qwhisper.errors import UsageError
from qwhisper.report import events, relay, streams
from qwhisper.report.events import RunLog, read_jsonl
from qwhisper.report.kinds import OutputLost
from qwhisper.report.streams import Unfailing
from qwhisper.train import hf as hooks
from qwhisper.train.run import main
from tests.pipes import full_pipe
from tests.test_faults.inject import outcome_of
from tests.test_faults.kill_shim import in_child
from tests.test_faults.lives import At
from tests.test_faults.matrix import fault


def trackers_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr(hooks, "Tracker", lambda callback: callback)


def fails_in(event: str) -> type[TrainerCallback]:
    def raising(self, args, state, control, **kwargs):
        raise ConnectionError("the tracking server is gone")

    return type("BrokenTracker", (TrainerCallback,), {event: raising})


def outcome_with_tracker(arguments, monkeypatch, event: str):
    """Of a run with a tracker that raises in `event`."""
    monkeypatch.setattr(hooks, "get_reporting_integration_callbacks", lambda names: [fails_in(event)])
    return outcome_of(arguments(max_steps=2, report_to=["broken"]))


def assert_named_once(said: str, event: str) -> None:
    assert said.count("BrokenTracker failed in") == 1 and f"failed in {event} (ConnectionError" in said


@fault(
    "a tracker fails while logging",
    of="logger",
    guarantee="it is named once and left out; the run continues to its end",
    without=trackers_as_they_are,
)
def test_tracker_fails_in_on_log(arguments, monkeypatch, capsys):
    outcome = outcome_with_tracker(arguments, monkeypatch, "on_log")
    assert outcome.code == 0, outcome.message
    assert_named_once(capsys.readouterr().err, "on_log")


@fault(
    "a tracker can't be reached when the run begins",
    of="logger",
    guarantee="it is named once and left out; the run continues to its end",
    without=trackers_as_they_are,
)
def test_tracker_fails_in_on_train_begin(arguments, monkeypatch, capsys):
    outcome = outcome_with_tracker(arguments, monkeypatch, "on_train_begin")
    assert outcome.code == 0, outcome.message
    assert_named_once(capsys.readouterr().err, "on_train_begin")


def test_what_a_users_own_callback_raises_is_not_hidden(arguments):
    outcome = outcome_of(arguments(), [fails_in("on_log")()])
    assert outcome.code is None and "the tracking server is gone" in outcome.message


def errors_of_logs_are_errors_of_the_run(monkeypatch) -> None:
    def append(self, file, record):
        with (self.folder / file).open("a") as handle:
            handle.write(json.dumps(record) + "\n")

    monkeypatch.setattr(RunLog, "append", append)


def full_disk(log: Path) -> None:
    """Nothing can be written to it: ENOSPC, from the kernel itself. It must not be read: that never ends."""
    log.symlink_to("/dev/full")


@fault(
    "the disk is full when a log is written",
    of="logger",
    guarantee="stderr reports it once; the run continues to its end and saves its checkpoints",
    without=errors_of_logs_are_errors_of_the_run,
)
def test_logs_on_a_full_disk(arguments, capsys):
    args = arguments(max_steps=2)
    Path(args.output_dir).mkdir()
    full_disk(Path(args.output_dir) / "metrics.jsonl")
    outcome = outcome_of(args)
    assert outcome.code == 0 and outcome.finite, outcome.message
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl can't be written ([Errno 28] No space left on device)") == 1


def errors_of_output_are_errors_of_the_run(monkeypatch) -> None:
    def give_up(self, error):
        raise error

    monkeypatch.setattr(Unfailing, "give_up", give_up)


def pipe_without_reader() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@fault(
    "the reader of the pipe that a run prints to is gone",
    of="logger",
    guarantee="stderr reports it once; the run continues to its end, with the exit code that it would have had",
    without=errors_of_output_are_errors_of_the_run,
)
def test_a_pipe_that_nobody_reads(arguments, monkeypatch, capsys):
    pipe = os.fdopen(pipe_without_reader(), "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    outcome = outcome_of(arguments(max_steps=2))
    with contextlib.suppress(BrokenPipeError):  # without the guard, of what is left in its buffer
        pipe.close()
    assert outcome.code == 0 and outcome.finite, outcome.message
    assert capsys.readouterr().err.count("stdout can't be written ([Errno 32] Broken pipe)") == 1


def output_waits_for_its_reader(monkeypatch) -> None:
    """As it would: here a write that would wait for ever raises instead."""

    def write(self, text: str) -> int:
        assert select.select([], [self._stream], [], 0)[1], "the run waits for its reader"
        return self._stream.write(text)

    monkeypatch.setattr(streams, "start_relay", lambda streams: None)
    monkeypatch.setattr(Unfailing, "write", write)


def with_a_reader_that_has_stopped(work) -> int:
    """How a process that does `work` ended, with stdout and stderr in one pipe that takes no byte more."""
    reading, writing = full_pipe()

    def printing_to_the_pipe():
        relay.PATIENCE_S = 0.1
        with os.fdopen(os.dup(writing), "w", buffering=1) as pipe, redirect_stdout(pipe), redirect_stderr(pipe):
            work()

    code = in_child(printing_to_the_pipe)
    os.close(reading)
    os.close(writing)
    return code


def losses(args) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_jsonl(Path(args.output_dir) / "metrics.jsonl")]


@pytest.mark.trains_in_forks
@fault(
    "the reader of the pipe that a run prints to has stopped",
    of="logger",
    guarantee="no step waits for it: the run continues to its end, and events.jsonl has the number of lines lost",
    without=output_waits_for_its_reader,
)
def test_a_pipe_whose_reader_has_stopped(arguments, tmp_path):
    args = arguments(max_steps=2)
    assert with_a_reader_that_has_stopped(lambda: main(args)) == 0
    events_of_run = read_jsonl(Path(args.output_dir) / "events.jsonl")
    (lost,) = [event["lines"] for event in events_of_run if event["kind"] == "output_lost"]
    assert lost > args.max_steps
    other = arguments(max_steps=2, output_dir=str(tmp_path / "heard"))
    assert main(other) == 0 and losses(args) == losses(other)


@pytest.mark.trains_in_forks
def test_lost_output_is_no_act_of_a_guard_and_is_not_written_into_the_folder_of_another_run(arguments, capsys):
    args = arguments(max_steps=1, save_steps=1)
    assert with_a_reader_that_has_stopped(lambda: main(args)) == 0
    before = (Path(args.output_dir) / "events.jsonl").read_bytes()
    assert b"output_lost" in before

    def refused():
        with pytest.raises(UsageError, match="holds another run"):
            main(args)

    assert with_a_reader_that_has_stopped(refused) == 0
    assert (Path(args.output_dir) / "events.jsonl").read_bytes() == before
    assert main(arguments(max_steps=2, save_steps=1, resume_from_checkpoint="latest")) == 0
    assert "No guard had to act" in capsys.readouterr().out


@pytest.mark.trains_in_forks
@fault(
    "SIGTERM while the reader of the pipe that a run prints to has stopped",
    of="logger",
    guarantee="a checkpoint is written, exit code 143",
    without=output_waits_for_its_reader,
)
def test_a_signal_while_a_reader_has_stopped(arguments):
    args = arguments(save_steps=100)

    def work():
        assert main(args, [At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))]) == 128 + signal.SIGTERM

    assert with_a_reader_that_has_stopped(work) == 0
    assert newest_usable(Path(args.output_dir))[0].name == "checkpoint-2"


@fault(
    "a kill in the middle of a line of a log",
    of="logger",
    guarantee="the lines before and after it can be read",
    without=lambda monkeypatch: monkeypatch.setattr(events, "ends_in_half_a_line", lambda path: False),
)
def test_half_a_line(tmp_path):
    RunLog(tmp_path).event(OutputLost(lines=1), step=1)
    whole = (tmp_path / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(whole + whole[: len(whole) // 2])
    log = RunLog(tmp_path)
    for lines in (2, 3):
        log.event(OutputLost(lines=lines), step=2)
    assert [record["lines"] for record in read_jsonl(tmp_path / "events.jsonl")] == [1, 2, 3]


def test_a_log_that_is_written_again_after_a_full_disk_goes_on_with_whole_lines(tmp_path):
    log = RunLog(tmp_path)
    log.metric(step=1)
    path = tmp_path / "metrics.jsonl"
    path.rename(tmp_path / "kept")
    full_disk(path)
    log.metric(step=2)
    path.unlink()
    (tmp_path / "kept").rename(path)
    with path.open("a") as handle:
        handle.write('{"step": 2')
    log.metric(step=3)
    assert [record["step"] for record in read_jsonl(path)] == [1, 3]
