"""A signal in the middle of a step: what is saved is the last whole step, and the resumed run is the uninterrupted one.

The grace is patched to nothing, so that a step is given up at the next pack.
"""

import dataclasses
import json
import math
import os
import shlex
import signal
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from transformers import TrainerCallback

from qwhisper.checkpoint.names import SNAPSHOT_FILE
from qwhisper.checkpoint.reading import newest_usable
from qwhisper.cli import main as cli
from qwhisper.data import loader
from qwhisper.data.source import ShuffledDialogues
from qwhisper.engine import kernels
from qwhisper.engine.executor import Executor
from qwhisper.frames import SAMPLE_RATE
from qwhisper.report.events import acts, read_jsonl
from qwhisper.train import probe, session, signals
from qwhisper.train.run import main
from qwhisper.train.signals import GRACE_SECONDS, Stopped, StopSignals
from tests.small import write_dialogues
from tests.test_faults.inject import plant
from tests.test_faults.lives import At
from tests.train.helpers import checkpoint_tensors, make_run, same_bits
from tests.workers import CrashingReader, SignalsAndHangs, worker_pids

NUM_DIALOGUES, SAMPLES, SEED = 12, 6, 7
STEP = 2  # counted from 0: the first of the second epoch
NUM_PACKS = 3
WITHOUT_CLIP = (4, 9)  # as write_dialogues makes them


def dialogues_of_the_step() -> list[int]:
    steps = ShuffledDialogues(dialogues=range(NUM_DIALOGUES), samples_per_step=SAMPLES, seed=SEED).steps()
    return [index for index in next(islice(steps, STEP, None)).dialogues if index not in WITHOUT_CLIP]


QUARANTINED, NAN = (f"d{index}" for index in dialogues_of_the_step()[:2])


class Packs(TrainerCallback):
    """Notes the packs of STEP, the ids of each; `at` the pack it says, SIGTERM comes."""

    def __init__(self, monkeypatch, at):
        self.at, self.in_step, self.seen, self.signalled = at, False, [], 0
        self.gradients_left = None
        honest = Executor.batch

        def batch(executor, samples):
            if self.in_step and executor.model.training:
                self.seen.append([sample.id for sample in samples])
                self.before_pack(executor)
                if not self.signalled and self.at(self.seen):
                    self.signalled = len(self.seen)
                    os.kill(os.getpid(), signal.SIGTERM)
            return honest(executor, samples)

        monkeypatch.setattr(Executor, "batch", batch)

    def before_pack(self, executor):
        """What goes wrong in this pack."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(1)  # a callback may draw
        self.in_step = state.global_step == STEP

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.gradients_left = [name for name, p in model.named_parameters() if p.grad is not None]


def no_fault(packs: Packs, monkeypatch) -> None:
    pass


def a_loss_is_nan(packs: Packs, monkeypatch) -> None:
    plant(monkeypatch, lambda executor, loss: loss * math.nan if packs.in_step else None, samples={NAN})


def memory_is_short(packs: Packs, monkeypatch) -> None:
    def before_pack(executor):
        if executor.max_tokens_per_pack > 100:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    packs.before_pack = before_pack


def gradients_overflow(packs: Packs, monkeypatch) -> None:
    def overflow(executor, loss):
        if packs.in_step and executor.loss_scale > 2.0**14:
            next(p.grad for p in executor.model.parameters() if p.grad is not None).view(-1)[0] = math.inf

    plant(monkeypatch, overflow, calls=range(10**6))


# Where the signal comes, by the packs seen so far; more than NUM_PACKS of them show that the fault was met.
CASES = {
    "in the step": (lambda seen: len(seen) == 2, no_fault, {}),
    "before the diagnosis": (lambda seen: len(seen) > NUM_PACKS and NAN in seen[-1], a_loss_is_nan, {}),
    "sample by sample": (lambda seen: len(seen) > NUM_PACKS and seen[-1] == [NAN], a_loss_is_nan, {}),
    "after a pack was halved": (lambda seen: len(seen) > NUM_PACKS, memory_is_short, {}),
    "after an overflow": (lambda seen: len(seen) > NUM_PACKS, gradients_overflow, {"dtype": "fp16"}),
}
QUICK = ("sample by sample",)  # the latest moment of a diagnosis


@pytest.fixture
def make_arguments(arguments, tmp_path):
    """`arguments` for steps of several packs with dropout, in each of which data is read that can't be used."""
    train_file = write_dialogues(tmp_path / "data", NUM_DIALOGUES)
    soundfile.write(tmp_path / f"data/clip{QUARANTINED[1:]}.wav", np.zeros(0), SAMPLE_RATE)

    def make(name: str, *, max_steps: int = STEP + 1, **values):
        return arguments(
            train_file=str(train_file), output_dir=str(tmp_path / name), seed=SEED, max_steps=max_steps,
            per_device_train_batch_size=SAMPLES // 2, gradient_accumulation_steps=2, max_tokens_per_pack="130",
            lora_dropout=0.2, projector_dropout=0.2, max_bad_fraction=0.5, freeze_projector_steps=0,
            activation_clamp="0.5", **values,
        )  # fmt: skip

    return make


def saved(folder: Path):
    state = json.loads((folder / "state.json").read_text())
    del state["probe"]  # seconds
    return checkpoint_tensors(folder), state


def written(folder: Path):
    """Quarantined dialogues, events without their time, and the loss of every step."""
    events = [event | {"time": None} for event in acts(read_jsonl(folder / "events.jsonl"))]
    losses = [(line["step"], line["loss"]) for line in read_jsonl(folder / "metrics.jsonl")]
    return read_jsonl(folder / "quarantine.jsonl"), events, losses


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_step_that_was_given_up_leaves_no_trace(make_arguments, monkeypatch, case):
    at, plant_fault, values = CASES[case]
    whole = make_arguments("whole", save_steps=1, save_total_limit=9, **values)
    with pytest.MonkeyPatch.context() as patch:
        packs = Packs(patch, at=lambda seen: False)
        plant_fault(packs, patch)
        assert main(whole, [packs]) == 0

    parts = make_arguments("parts", save_steps=100, **values)
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.0)
    packs = Packs(monkeypatch, at)
    plant_fault(packs, monkeypatch)
    assert main(parts, [packs]) == 128 + signal.SIGTERM
    assert packs.signalled == len(packs.seen), "it went on"
    assert packs.gradients_left == []
    folder, whole_folder = Path(parts.output_dir), Path(whole.output_dir)
    assert newest_usable(folder)[0].name == f"checkpoint-{STEP}"
    assert_same(folder, whole_folder, STEP)

    packs.at = lambda seen: False
    assert main(dataclasses.replace(parts, resume_from_checkpoint="latest"), [packs]) == 0
    assert_same(folder, whole_folder, parts.max_steps)
    assert written(folder) == written(whole_folder)


def assert_same(folder: Path, other: Path, step: int) -> None:
    (tensors, state), (other_tensors, other_state) = (saved(f / f"checkpoint-{step}") for f in (folder, other))
    for each in (state, other_state):  # a checkpoint between two snapshots holds them as well
        each["saved_with"].pop(SNAPSHOT_FILE, None)
    assert same_bits(tensors, other_tensors) == [] and state == other_state


def test_a_step_is_finished_within_its_grace(make_arguments, monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 1000.0)
    args = make_arguments("run", save_steps=100, max_steps=STEP + 2)
    packs = Packs(monkeypatch, at=lambda seen: len(seen) == 1)
    assert main(args, [packs]) == 128 + signal.SIGTERM
    assert len(packs.seen) == NUM_PACKS
    assert newest_usable(Path(args.output_dir))[0].name == f"checkpoint-{STEP + 1}"


def test_a_signal_ends_a_first_pass_at_once_and_the_step_leaves_no_trace(make_arguments, monkeypatch):
    """A first pass may compile for a minute, and polls nothing."""
    taken = []

    def compiles(samples, count):
        with run.executor.while_compiling():
            os.kill(os.getpid(), signal.SIGTERM)
            taken.append("not reached")

    with StopSignals() as stop:
        run, samples = make_run(make_arguments("stopped"))
        run.executor.while_compiling = stop.raising
        monkeypatch.setattr(run.executor, "run_packs", compiles)
        with pytest.raises(Stopped):
            run.executor.forward_backward(samples, 1)
        assert taken == [] and stop.exit_code == 128 + signal.SIGTERM
        with pytest.raises(Stopped), stop.raising():
            taken.append("not reached")
        os.kill(os.getpid(), signal.SIGTERM)  # outside of it, another signal raises nothing
    assert taken == []


def test_the_grace_begins_with_the_last_pack_before_the_signal(monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(signals, "time", clock)
    with StopSignals() as stop:
        clock.now = 1000.0
        stop.between_packs()
        clock.now += 0.75 * GRACE_SECONDS  # the pack in which the signal comes
        os.kill(os.getpid(), signal.SIGTERM)
        stop.between_packs()
        clock.now += 0.25 * GRACE_SECONDS
        with pytest.raises(Stopped):
            stop.between_packs()


@pytest.fixture
def hang_up_ends_a_process():
    """As a shell leaves SIGHUP; these tests may themselves run under nohup, which leaves it ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_a_connection_that_drops_leaves_a_checkpoint(arguments, hang_up_ends_a_process):
    args = arguments(max_steps=3, save_steps=100)
    assert main(args, [At(1, lambda: os.kill(os.getpid(), signal.SIGHUP))]) == 128 + signal.SIGHUP
    assert newest_usable(Path(args.output_dir))[0].name == "checkpoint-1"


def test_the_check_of_kernels_is_left_at_a_signal(arguments, monkeypatch):
    trials = []

    def first_fault(kernel, cases):
        trials.append(cases)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(kernels, "first_fault", first_fault)
    args = arguments(max_steps=2)
    assert main(args) == 128 + signal.SIGTERM
    assert len(trials) == 1 and newest_usable(Path(args.output_dir))[0] is None


@pytest.fixture
def read_interrupted(monkeypatch):
    """A function: from now on what reads a dialogue, in this process or in a worker, sends a signal and hangs.

    reader: what is read then, "held-out data" or "the probe". Returns a function after which all reading is as before
    and no signal is sent any more.
    """
    ids, honest = frozenset(f"d{number}" for number in range(24)), session.hold_out

    def interrupt(number, reader):
        how = SignalsAndHangs(os.getpid(), number)
        crashing = partial(CrashingReader, ids=ids, how=how)
        patch = pytest.MonkeyPatch()

        def hold_out(*arguments):
            found = honest(*arguments)
            patch.setattr(loader, "DialogueReader", crashing)
            return found

        if reader == "held-out data":
            patch.setattr(loader, "DialogueReader", crashing)
        else:
            patch.setattr(session, "hold_out", hold_out)

        def let_go():
            patch.undo()
            how.end()

        undone.append(let_go)
        return let_go

    undone: list = []
    monkeypatch.setattr(session, "shortest_probed", lambda **_: 1)
    yield interrupt
    for undo in undone:
        undo()


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def continued(said: str) -> int:
    """The exit code of the command that a stopped run has named."""
    (line,) = said.splitlines()
    return cli(shlex.split(line.rpartition("continue with: ")[2])[1:])


@pytest.mark.parametrize(
    ("reader", "number", "num_workers"),
    [
        ("held-out data", signal.SIGINT, 0),
        ("held-out data", signal.SIGTERM, 1),
        ("the probe", signal.SIGINT, 1),
        ("the probe", signal.SIGTERM, 0),
    ],
)
def test_reading_before_the_first_step_is_left_at_a_signal(
    arguments, tmp_path, capsys, read_interrupted, reader, number, num_workers
):
    data = write_dialogues(tmp_path / "held", 24, name="eval.jsonl")
    args = arguments(eval_file=str(data), max_steps=1, dataloader_num_workers=num_workers)
    folder = Path(args.output_dir)
    read_interrupted(number, reader)
    assert main(args) == 128 + number
    said = capsys.readouterr().err
    assert said == f"stopped by a signal after step 0; continue with: qwhisper train --config {folder}/config.yaml\n"
    assert worker_pids() == [] and files_in(folder) == {"config.yaml", ".lock"}


def test_a_resume_that_a_signal_ends_before_its_first_step_can_be_continued(
    arguments, tmp_path, capsys, read_interrupted
):
    args = arguments(max_steps=2, save_steps=1)
    assert main(args) == 0
    data = write_dialogues(tmp_path / "held", 24, name="eval.jsonl")
    earlier = str(Path(args.output_dir) / "checkpoint-1")
    changed = dataclasses.replace(args, eval_file=str(data), learning_rate=3e-3, resume_from_checkpoint=earlier)
    moved = dataclasses.replace(changed, output_dir=str(tmp_path / "new"))
    for resumed in (moved, changed):
        let_go = read_interrupted(signal.SIGTERM, "held-out data")
        capsys.readouterr()
        assert main(resumed) == 128 + signal.SIGTERM
        let_go()
        said = capsys.readouterr().err
        assert said.startswith("stopped by a signal after step 1; continue with: qwhisper train --config ")
        assert continued(said) == 0
        folder = Path(resumed.output_dir)
        assert [event["kind"] for event in read_jsonl(folder / "events.jsonl")][-2:] == ["resumed", "end"]
        assert "learning_rate: 0.003\n" in (folder / "config.yaml").read_text()
        assert newest_usable(folder)[0].name == "checkpoint-2"


def test_generation_in_a_probe_is_left_at_a_signal(arguments, monkeypatch):
    run, _ = make_run(arguments())
    tokens = []
    run.executor.model.register_forward_pre_hook(lambda *_: tokens.append(1))

    def own_answers(model, encoder, count):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=9, pad_token_id=0, do_sample=False)

    def signal_at_the_second_token():
        if len(tokens) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(probe, "own_answers", own_answers)
    listening = probe.ListeningProbe(run.executor, run.encoder, [], probe.ProbeState(), first_step=1)
    before_pack = run.executor.before_pack
    with StopSignals() as stop:
        run.executor.model.register_forward_pre_hook(lambda *_: signal_at_the_second_token())
        assert stop.unless_stopped(run.executor, listening.text_shift) is None
    assert len(tokens) == 2 and run.executor.before_pack is before_pack


def test_processes_that_read_data_leave_a_connection_that_drops_to_the_trainer(arguments, hang_up_ends_a_process):
    def hang_up():
        for pid in worker_pids():
            os.kill(pid, signal.SIGHUP)

    args = arguments(max_steps=4, save_steps=100, dataloader_num_workers=1)
    assert main(args, [At(2, hang_up)]) == 0
    assert acts(read_jsonl(Path(args.output_dir) / "events.jsonl")) == []


def test_a_run_under_nohup_outlives_its_terminal():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)
