"""Processes that get a signal to end, or die: the trainer, those that read its data, and two trainers in one folder."""

import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import socket
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from qwhisper import locks
from qwhisper.checkpoint import folders, reading
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.reading import newest_usable
from qwhisper.data import loader, processes, worker
from qwhisper.engine.executor import Executor
from qwhisper.errors import UsageError
from qwhisper.train.run import main
from qwhisper.train.signals import StopSignals
from tests.test_faults.inject import outcome_of
from tests.test_faults.kill_shim import in_child, kill
from tests.test_faults.lives import At, end_state
from tests.test_faults.matrix import fault
from tests.train.helpers import read_lines, same_bits
from tests.workers import CrashingReader, ExitingReader, Hangs, NeverComes, die, worker_pids

pytestmark = pytest.mark.trains_in_forks

SECONDS = 5  # after which something that should come at once is taken not to come


def signals_wait(monkeypatch) -> None:
    """A signal is asked for between steps alone."""
    monkeypatch.setattr(StopSignals, "poll", lambda self: None)


@fault(
    "SIGTERM in the middle of an evaluation",
    of="process",
    guarantee="the evaluation is left at once, a checkpoint is written, exit code 143",
    without=signals_wait,
)
def test_evaluation_is_left_at_a_signal(arguments, train_file, monkeypatch):
    args = arguments(max_steps=3, save_steps=100, eval_file=str(train_file), eval_steps=2, max_tokens_per_pack="60")
    honest, packs, trained = Executor.run_pack, [], []

    def run_pack(self, batch):
        if self.model.training:
            trained.append(batch)
        elif trained:  # the evaluation before the first step leaves nothing to save
            packs.append(batch)
            if len(packs) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch)

    monkeypatch.setattr(Executor, "run_pack", run_pack)
    assert outcome_of(args).code == 128 + signal.SIGTERM
    assert len(packs) == 1, "the evaluation went on"
    assert newest_usable(Path(args.output_dir))[0].name == "checkpoint-2"
    assert main(dataclasses.replace(args, resume_from_checkpoint="latest")) == 0


@fault(
    "SIGINT while waiting for data that does not come",
    of="process",
    guarantee="the wait is left at once, a checkpoint is written, exit code 130",
    without=signals_wait,
)
def test_waiting_for_data_is_left_at_a_signal(arguments, tmp_path, monkeypatch):
    args = arguments(max_steps=5, save_steps=100, dataloader_num_workers=1)
    never = NeverComes(trainer=os.getpid(), after_steps=3, waits=tmp_path / "waits", seconds=SECONDS)
    honest, answers = processes.Worker.answer, iter(range(100))

    def answer(self, poll=processes.nothing):
        if next(answers) == never.after_steps:
            never.waits.touch()
        return honest(self, poll)

    monkeypatch.setattr(processes.Worker, "answer", answer)
    monkeypatch.setattr(loader, "DialogueReader", lambda encoder, **given: replace(never, encoder=encoder, **given))
    assert outcome_of(args).code == 128 + signal.SIGINT
    assert newest_usable(Path(args.output_dir))[0].name == "checkpoint-3", "it waited for the samples"
    assert worker_pids() == []


@fault(
    "a second signal in the middle of the save that the first one asked for",
    of="process",
    guarantee="the save is finished: a whole checkpoint, the first signal's exit code",
    without=lambda monkeypatch: monkeypatch.setattr(StopSignals, "receive", signal.default_int_handler),
)
def test_second_signal_in_the_save(arguments, monkeypatch):
    args = arguments(max_steps=6, save_steps=100)
    honest = folders.write_manifest

    def interrupted(*values):
        os.kill(os.getpid(), signal.SIGINT)
        honest(*values)

    monkeypatch.setattr(folders, "write_manifest", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        code = None
        code = main(args, [At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    assert code == 128 + signal.SIGTERM
    assert newest_usable(Path(args.output_dir))[0].name == "checkpoint-2"


def deaths_are_let_through(monkeypatch) -> None:
    """A dead worker is an error of the run, as in torch's DataLoader."""
    honest = processes.Worker.answer

    def answer(self, poll=processes.nothing):
        try:
            return honest(self, poll)
        except processes.WorkerDied as death:
            raise RuntimeError(f"data worker: {death.how}") from None

    monkeypatch.setattr(processes.Worker, "answer", answer)


def whole_run(args, tmp_path, **values) -> dict[str, torch.Tensor]:
    args = dataclasses.replace(args, output_dir=str(tmp_path / "whole"), dataloader_num_workers=0, **values)
    assert main(args) == 0
    return end_state(tmp_path / "whole", args.max_steps)


@fault(
    "a process that reads data is killed",
    of="process",
    guarantee="all are started again at the same position, with one event: the same samples in the same order",
    without=deaths_are_let_through,
)
def test_a_killed_worker(arguments, tmp_path):
    args = arguments(max_steps=7, save_steps=7, dataloader_num_workers=2)
    outcome = outcome_of(args, [At(1, lambda: os.kill(worker_pids()[0], signal.SIGKILL))])
    assert outcome.code == 0, outcome.message
    assert [event["how"] for event in outcome.events] == ["signal 9"]
    assert same_bits(whole_run(args, tmp_path), outcome.tensors) == []


def crash_on(monkeypatch, ids: set[str], how) -> None:
    """Reading one of these dialogues does `how` to the process, unless that is the trainer."""
    reader = partial(CrashingReader, ids=frozenset(ids), how=how, trainer=os.getpid())
    monkeypatch.setattr(loader, "DialogueReader", reader)


def killers_are_not_looked_for(monkeypatch) -> None:
    monkeypatch.setattr(loader.DialogueReader, "reject_killers", lambda self, dialogues, poll=None: [])


@fault(
    "a sample whose reading kills the process, every time",
    of="process",
    guarantee="it is found, quarantined and named; the others of its step are trained on (needs data workers)",
    without=killers_are_not_looked_for,
)
def test_a_sample_that_kills_its_reader(arguments, monkeypatch):
    crash_on(monkeypatch, {"d5"}, die)
    args = arguments(max_steps=6, save_steps=6, dataloader_num_workers=1, max_bad_fraction=0.5)
    outcome = outcome_of(args)
    assert outcome.code == 0, outcome.message
    assert outcome.ids("worker_died") == {"d5"} and outcome.count("worker_died") == 1
    bad = read_lines(Path(args.output_dir) / "quarantine.jsonl")
    assert {line["id"] for line in bad} == {"d5"} and "signal 9" in bad[0]["reason"]
    state = json.loads((Path(args.output_dir) / "checkpoint-6/state.json").read_text())
    assert state["skipped_steps"] == 0 and state["bad_samples"] == len(bad)


@fault(
    "a sample whose reading never ends: a decoder in a loop, a dead network drive",
    of="process",
    guarantee="the process is stopped after 15 minutes, the sample quarantined and named (needs data workers)",
    without=lambda monkeypatch: monkeypatch.setattr(processes, "ANSWER_SECONDS", math.inf),
)
def test_a_sample_that_hangs_its_reader(arguments, tmp_path, monkeypatch, guard):
    # Without the guard it ends, so that the test does. With it, it outlasts the steps that are trained on meanwhile.
    hangs = Hangs(tmp_path / "hangs", seconds=SECONDS if guard == "off" else 60 * SECONDS)
    crash_on(monkeypatch, {"d5"}, hangs)
    jumps = [0.0]  # the clock goes on by 1000 s whenever it is asked while a process hangs

    def monotonic() -> float:
        jumps.append(1000.0 if hangs.now() else 0.0)
        return time.monotonic() + sum(jumps)

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=monotonic))
    in_pairs = {"max_steps": 6, "save_steps": 6, "gradient_accumulation_steps": 1}
    args = arguments(**in_pairs, dataloader_num_workers=1, max_bad_fraction=0.5)
    outcome = outcome_of(args)
    assert outcome.code == 0, outcome.message
    assert outcome.ids("worker_died") == {"d5"}
    bad = read_lines(Path(args.output_dir) / "quarantine.jsonl")
    assert {line["id"] for line in bad} == {"d5"} and "no answer in 900 s" in bad[0]["reason"]


@fault(
    "processes that read data die again and again, whatever they read",
    of="process",
    guarantee="the run ends with exit code 3 and says which flag to lower",
    without=lambda monkeypatch: monkeypatch.setattr(loader, "MAX_DEATHS", 20),
)
def test_workers_that_keep_dying(arguments, monkeypatch):
    deaths = iter(range(10))

    def none_is_at_fault(self, dialogues, poll):
        if next(deaths) == 9:
            raise AssertionError("it is started again and again")
        return []

    monkeypatch.setattr(loader.DialogueReader, "reject_killers", none_is_at_fault)
    monkeypatch.setattr(loader, "DialogueReader", ExitingReader)
    outcome = outcome_of(arguments(dataloader_num_workers=1))
    assert outcome.code == 3 and "lower --dataloader_num_workers" in outcome.message


def signals_are_taken(monkeypatch) -> None:
    """Workers take them as any program does."""
    careless = "import qwhisper.data.worker; from tests.workers import careless_main as main"
    monkeypatch.setattr(worker, "ENTRY", worker.ENTRY.replace("from qwhisper.data.worker import main", careless))


@fault(
    "Ctrl-C, which the terminal sends to every process",
    of="process",
    guarantee="the processes that read data ignore it; the trainer saves and ends",
    without=signals_are_taken,
)
def test_workers_leave_a_signal_to_the_trainer(arguments):
    args = arguments(max_steps=5, save_steps=5, dataloader_num_workers=1)
    outcome = outcome_of(args, [At(1, lambda: [os.kill(pid, signal.SIGINT) for pid in worker_pids()])])
    assert outcome.code == 0 and outcome.count("worker_died") == 0


def others_inherit_the_trainers_end(monkeypatch) -> None:
    """A worker holds the other end of its own socket, as it would in a fork."""
    pairs = []

    def socketpair():
        pairs.append(socket.socketpair())
        return pairs[-1]

    def start(descriptor):
        return subprocess.Popen(worker.command(descriptor), pass_fds=[descriptor, pairs[-1][0].fileno()])

    monkeypatch.setattr(processes, "socket", SimpleNamespace(socketpair=socketpair, SHUT_RDWR=socket.SHUT_RDWR))
    monkeypatch.setattr(processes, "_start", start)


@fault(
    "SIGKILL of a trainer that has processes reading data",
    of="process",
    guarantee="they end as well: none is left holding memory",
    without=others_inherit_the_trainers_end,
)
def test_no_process_stays_behind(arguments, tmp_path):
    told = tmp_path / "pids"

    def tell_and_die() -> None:
        told.write_text(" ".join(map(str, worker_pids())))
        kill()

    args = arguments(dataloader_num_workers=2)
    assert in_child(lambda: main(args, [At(2, tell_and_die)])) == -signal.SIGKILL
    pids = [int(pid) for pid in told.read_text().split()]
    pidfds = [os.pidfd_open(pid) for pid in pids if Path(f"/proc/{pid}").exists()]
    try:
        deadline = time.monotonic() + SECONDS
        while pidfds and select.select(pidfds, [], [], max(0.0, deadline - time.monotonic()))[0]:
            pidfds = [fd for fd in pidfds if not select.select([fd], [], [], 0)[0]]
        assert not pidfds, f"{len(pidfds)} of {len(pids)} are still there"
    finally:
        for fd in pidfds:
            signal.pidfd_send_signal(fd, signal.SIGKILL)


@fault(
    "a second trainer in the same folder",
    of="process",
    guarantee="it is refused with exit code 2 before it has changed anything; the lock ends with its process",
    without=lambda monkeypatch: monkeypatch.setattr(locks, "hold", lambda *_, **__: None),
)
def test_two_trainers_in_one_folder(arguments):
    args = arguments(max_steps=2, save_steps=1)
    folder = Path(args.output_dir)
    seen = {}

    def second_trainer() -> None:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        again = dataclasses.replace(args, resume_from_checkpoint="latest")
        seen["exit code"] = in_child(lambda: os._exit(outcome_of(again).code or 0))
        seen["changed"] = {path: path.stat().st_mtime_ns for path in folder.rglob("*")} != before

    assert main(args, [At(2, second_trainer)]) == 0  # when there is a checkpoint that it could go on from
    assert seen == {"exit code": UsageError.exit_code, "changed": False}
    killed = dataclasses.replace(args, resume_from_checkpoint="latest", max_steps=4)
    assert in_child(lambda: main(killed, [At(3, kill)])) == -signal.SIGKILL
    assert main(killed) == 0


def by_time(monkeypatch) -> None:
    honest = folders.checkpoints
    for module in (folders, reading):
        monkeypatch.setattr(
            module, "checkpoints", lambda folder: sorted(honest(folder), key=lambda p: p.stat().st_mtime)
        )


@fault(
    "the clock jumps, back by a year and ahead by a year",
    of="process",
    guarantee="nothing depends on it: the checkpoint with the highest step is the newest, no step takes negative time",
    without=by_time,
)
def test_clock_jumps(arguments, tmp_path, monkeypatch):
    args = arguments(max_steps=3, save_steps=1, save_total_limit=2)
    folder, year, honest = Path(args.output_dir), 365 * 86_400, time.time
    now = {"jump": 0}

    def jump() -> None:
        now["jump"] = -year if now["jump"] >= 0 else year
        for age, each in enumerate(checkpoints(folder)):  # of the future, or long ago, and the older the later
            os.utime(each, (honest() - now["jump"] - 1000 * age,) * 2)

    class Jumps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            jump()

    monkeypatch.setattr(time, "time", lambda: honest() + now["jump"])
    assert main(args, [Jumps()]) == 0
    jump()
    assert newest_usable(folder)[0].name == "checkpoint-3"
    assert all(line["seconds"] >= 0 for line in read_lines(folder / "metrics.jsonl"))
    monkeypatch.undo()
    assert same_bits(end_state(folder, 3), whole_run(args, tmp_path)) == []
