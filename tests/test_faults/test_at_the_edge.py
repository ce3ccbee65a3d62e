"""Faults at the edges: before the last save, among the moments, in a bad streak, while another fault is looked into."""

import dataclasses
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from qwhisper.checkpoint import folders
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.data import loader
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.held_out import hold_out
from qwhisper.engine.executor import Executor
from qwhisper.guards import snapshot
from qwhisper.train import loop
from qwhisper.train import recovery as rescue
from tests.test_faults.inject import (
    both_memories,
    device_memory_runs_out,
    gradient_element,
    loss_times,
    outcome_of,
    plant,
)
from tests.test_faults.matrix import fault
from tests.train.helpers import make_run, read_lines, step
from tests.workers import CrashingReader

VALUES = {"max_steps": 4, "save_steps": 2, "freeze_projector_steps": 0, "early_lr_steps": 0}
ONE_EPOCH = VALUES | {"max_steps": 3, "save_steps": 3}
TWO_STEPS = VALUES | {"max_steps": 2, "save_steps": 1}


class Moment(TrainerCallback):
    """Puts a value into Adam's second moment before the update of a step."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.step and optimizer.state:
            next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = self.value


def saves_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(loop, "keep_sound", lambda run, *, copy: None)


@fault(
    "NaN in Adam's second moment before the last step",
    of="numerical",
    guarantee="found before the save: weights and moments go back to the snapshot, and what is saved is sound",
    without=saves_as_it_is,
)
def test_a_broken_moment_before_the_last_save(arguments):
    outcome = outcome_of(arguments(**VALUES), [Moment(3, math.nan)])
    assert outcome.code == 0 and outcome.count("rewind") == 1 and outcome.finite


@fault(
    "infinity in Adam's second moment, which stops a weight and breaks none",
    of="numerical",
    guarantee="found at the next save or snapshot; both go back to the snapshot",
    without=saves_as_it_is,
)
def test_an_infinite_moment(arguments):
    outcome = outcome_of(arguments(**VALUES), [Moment(1, math.inf)])
    assert outcome.code == 0 and outcome.count("rewind") == 1
    assert all(torch.isfinite(tensor.float()).all() for tensor in outcome.tensors.values())


@fault(
    "saves in the middle of a bad streak",
    of="numerical",
    guarantee="no snapshot is taken there: a rewind finds weights from before the streak",
    without=lambda monkeypatch: monkeypatch.setattr(
        loop, "keep_sound", lambda run, *, copy: run.snapshots.take(run.state.step)
    ),
)
def test_saves_in_a_bad_streak(arguments, monkeypatch):
    plant(monkeypatch, gradient_element(math.nan), calls=range(3, 10**6))
    pairs = {"max_steps": 30, "save_steps": 1, "gradient_accumulation_steps": 1}
    outcome = outcome_of(arguments(**VALUES | pairs, max_bad_steps=3, max_rewinds=1))
    rewinds = [event for event in outcome.events if event["kind"] == "rewind"]
    assert outcome.code == 5 and [event["step"] - event["to_step"] for event in rewinds] == [3]


@fault(
    "a bad sample in an fp16 run",
    of="numerical",
    guarantee="the loss scale is as before, since no smaller value helped",
    without=lambda monkeypatch: monkeypatch.setattr(rescue, "run_samples", scale_stays(rescue.run_samples)),
)
def test_the_loss_scale_after_a_bad_sample(arguments, monkeypatch):
    run, samples = make_run(arguments(**VALUES, dtype="fp16"))
    before = run.state.guards.loss_scale.scale
    plant(monkeypatch, gradient_element(math.nan), samples={samples[1].id})
    report = step(run, samples[:4])
    assert report.num_samples == 3 and run.state.guards.loss_scale.scale == before


def scale_stays(honest):
    def run_samples(run, samples, count):
        statistics, divergence = honest(run, samples, count)
        if statistics.not_finite:
            run.state.guards.loss_scale.scale = 1.0
        return statistics, divergence

    return run_samples


@fault(
    "memory that runs out while a bad step is looked into",
    of="memory",
    guarantee="the diagnosis is left out; the bad sample is dropped, the rest of the step is taken",
    without=lambda monkeypatch: monkeypatch.setattr(rescue, "find_cause", device_memory_runs_out),
)
@both_memories
def test_no_memory_for_the_diagnosis(arguments, monkeypatch, run_out):
    monkeypatch.setattr(rescue, "diagnose", run_out)
    plant(monkeypatch, loss_times(math.nan), samples={"d3"})
    outcome = outcome_of(arguments(**ONE_EPOCH))
    assert outcome.code == 0 and {name for _, name in outcome.dropped} == {"d3"}
    assert outcome.count("no_diagnosis") == outcome.count("dropped_samples") > 0


@fault(
    "a sample of a bad step that does not fit into memory alone",
    of="memory",
    guarantee="it is dropped and named; the rest of the step is taken",
    without=lambda monkeypatch: monkeypatch.setattr(
        rescue.GradientSum, "add_one", lambda self, sample, count: " and ".join(self.add([sample], count).not_finite)
    ),
)
@both_memories
def test_no_memory_for_one_sample(arguments, monkeypatch, run_out):
    honest = Executor.run_packs

    def planted(self, samples, count):
        if [sample.id for sample in samples] == ["d3"]:
            run_out()
        return honest(self, samples, count)

    monkeypatch.setattr(Executor, "run_packs", planted)
    plant(monkeypatch, loss_times(math.nan), samples={"d3"})
    outcome = outcome_of(arguments(**ONE_EPOCH))
    assert outcome.code == 0 and {name for _, name in outcome.dropped} == {"d3"}


@fault(
    "held-out dialogues that don't fit into memory",
    of="memory",
    guarantee="an event says that they were not evaluated; training continues and is saved",
    without=lambda monkeypatch: monkeypatch.setattr(loop, "MemoryLimitError", KeyError),
)
@both_memories
def test_no_memory_for_the_evaluation(arguments, monkeypatch, train_file, run_out):
    honest = Executor.run_packs

    def planted(self, samples, count):
        if not torch.is_grad_enabled():
            run_out()
        return honest(self, samples, count)

    monkeypatch.setattr(Executor, "run_packs", planted)
    outcome = outcome_of(arguments(**TWO_STEPS, eval_file=str(train_file)))
    assert outcome.code == 0 and outcome.count("not_evaluated") == 3 and outcome.finite  # before the first step as well


@fault(
    "host memory that runs out in a snapshot",
    of="memory",
    guarantee="an event says that this step has none; training continues and is saved",
    without=lambda monkeypatch: monkeypatch.setattr(rescue, "is_out_of_memory", lambda error: False),
)
@pytest.mark.parametrize("told", ["by PyTorch", "by Python"])
def test_no_memory_for_a_snapshot(arguments, monkeypatch, told):
    def on_host(tensors, spare):
        return torch.empty(1 << 60) if told == "by PyTorch" else bytearray(1 << 60)

    monkeypatch.setattr(snapshot, "on_host", on_host)
    outcome = outcome_of(arguments(**TWO_STEPS))
    assert outcome.code == 0 and outcome.count("no_snapshot") == 3 and outcome.finite


@fault(
    "a run that is resumed from an older checkpoint than its newest",
    of="disk",
    guarantee="later ones are put aside by name: what is written now is kept, and is what the next resume finds",
    without=lambda monkeypatch: monkeypatch.setattr(folders, "put_aside_later", lambda folder, resumed: []),
)
def test_resumed_from_an_older_one(arguments, capsys):
    args = arguments(**VALUES | {"max_steps": 8}, save_total_limit=4)
    assert outcome_of(args).code == 0
    folder = Path(args.output_dir)
    first = dataclasses.replace(
        args, max_steps=4, save_total_limit=2, resume_from_checkpoint=str(folder / "checkpoint-2")
    )
    assert outcome_of(first).code == 0
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert {path.name for path in folder.glob("aside-*")} == {f"aside-checkpoint-{n}" for n in (4, 6, 8)}
    assert "aside-checkpoint-8" in capsys.readouterr().out


@fault(
    "a held-out clip that kills the process that reads it",
    of="data",
    guarantee="with data workers the dialogue is rejected by name, and the trainer lives",
    without=lambda monkeypatch: monkeypatch.setattr(
        loader.DialogueReader, "reject_killers", lambda self, dialogues: []
    ),
)
def test_a_killer_among_the_held_out(arguments, monkeypatch):
    args = arguments()
    run, _ = make_run(args)
    dialogues = read_dialogues(args.train_file)[2:5]
    monkeypatch.setattr(loader, "DialogueReader", partial(CrashingReader, ids=frozenset({"d3"})))
    try:
        held_out, rejections = hold_out(dialogues, run.encoder, num_workers=1)
    except Exception:
        held_out, rejections = [], []
    assert [rejection.id for rejection in rejections] == ["d3"] and len(held_out) == len(dialogues) - 1


@fault(
    "a signal in the middle of the last evaluation",
    of="process",
    guarantee="the resumed run makes up for the evaluation, and the best checkpoint is known",
    without=lambda monkeypatch: monkeypatch.setattr(
        loop, "evaluation_is_due", lambda run: run.state.step % run.plan.eval_steps == 0 and run.state.evaluated < 0
    ),
)
def test_the_evaluation_that_a_signal_cut(arguments, monkeypatch, train_file):
    args = arguments(**VALUES | {"save_steps": 4}, eval_file=str(train_file), eval_steps=4)
    honest, told = Executor.evaluate, []

    def evaluate(self, samples):
        told.append(1)
        if len(told) == 2:  # the first is before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, samples)

    monkeypatch.setattr(Executor, "evaluate", evaluate)
    outcome_of(args)
    assert outcome_of(dataclasses.replace(args, resume_from_checkpoint="latest")).code == 0
    losses = [line for line in read_lines(Path(args.output_dir) / "metrics.jsonl") if "eval_loss" in line]
    assert [line["step"] for line in losses] == [0, 4]
