"""Memory that runs out: while loading, in a pass, an evaluation, a save, with one sample alone."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch

from qwhisper.checkpoint.reading import newest_usable
from qwhisper.engine.executor import Executor
from qwhisper.guards.gradient_buffers import GradientBuffers
from qwhisper.model import loading
from qwhisper.train import loop, session
from qwhisper.train import run as train_run
from qwhisper.train.session import save_checkpoint
from tests.test_faults.inject import both_memories, outcome_of
from tests.test_faults.matrix import fault
from tests.train.helpers import TOLERANCE, assert_same, loss_and_gradients, make_run

VALUES = {"max_steps": 3, "save_steps": 3, "freeze_projector_steps": 0, "dtype": "fp32"}


def without_retry(monkeypatch) -> None:
    """Out of memory is let through, as a plain loop does."""
    monkeypatch.setattr(Executor, "within_memory", lambda self, attempt, samples, again: (attempt(), []))


def keeping_what_is_there(monkeypatch) -> None:
    """A step that is run again adds to the gradients that the failed attempt has left."""
    honest = GradientBuffers.start

    def start(self):
        if all(p.grad is None for parameters in self.groups.values() for p in parameters):
            honest(self)

    monkeypatch.setattr(GradientBuffers, "start", start)


def too_little_memory(monkeypatch, run_out, *, tokens: int, training: bool) -> None:
    """A forward pass of more than `tokens` tokens, in training or in evaluation, does not fit."""
    honest = Executor.run_packs

    def planted(self, samples, count):
        if torch.is_grad_enabled() == training and any(
            sum(len(s.input_ids) for s in pack) > tokens for pack in self.packs(samples)
        ):
            run_out()
        return honest(self, samples, count)

    monkeypatch.setattr(Executor, "run_packs", planted)


def survived(call):
    """What `call` gives, or None if it ran out of memory."""
    try:
        return call()
    except RuntimeError:
        return None


@fault(
    "out of memory in the forward pass",
    of="memory",
    guarantee="the pack is halved and the step run again: same samples, same gradients",
    without=without_retry,
)
@both_memories
def test_forward(arguments, monkeypatch, run_out):
    run, samples = make_run(arguments(**VALUES))
    expected = loss_and_gradients(run, samples[:4], max_tokens=10_000)
    too_little_memory(monkeypatch, run_out, tokens=2 * max(len(s.input_ids) for s in samples[:4]), training=True)
    got = survived(lambda: loss_and_gradients(run, samples[:4], max_tokens=10_000))
    assert got is not None, "the step is lost"
    assert_same(expected, got)
    assert run.executor.max_tokens_per_pack < 10_000


@fault(
    "out of memory in the backward pass, after other packs have left their gradients",
    of="memory",
    guarantee="what they left is dropped before the step is run again: nothing counts twice",
    without=keeping_what_is_there,
)
@both_memories
def test_backward(arguments, monkeypatch, run_out):
    run, samples = make_run(arguments(**VALUES))
    longest = max(len(s.input_ids) for s in samples[:4])
    expected = loss_and_gradients(run, samples[:4], max_tokens=2 * longest)
    for parameter in run.executor.model.parameters():
        parameter.grad = None
    backward, calls = torch.Tensor.backward, []

    def planted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            run_out()
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", planted)
    assert_same(expected, loss_and_gradients(run, samples[:4], max_tokens=2 * longest))
    assert len(calls) > 3


@fault(
    "out of memory in an evaluation",
    of="memory",
    guarantee="smaller packs, the same held-out loss; training continues",
    without=without_retry,
)
@both_memories
def test_evaluation(arguments, monkeypatch, run_out):
    run, samples = make_run(arguments(**VALUES))
    expected = run.executor.evaluate(samples)
    too_little_memory(monkeypatch, run_out, tokens=2 * max(len(s.input_ids) for s in samples), training=False)
    loss = survived(lambda: run.executor.evaluate(samples))
    assert loss is not None, "the evaluation is lost"
    assert abs(loss - expected) <= TOLERANCE * expected and run.executor.model.training


@fault(
    "out of memory in mid-run",
    of="memory",
    guarantee="the pack size it settled on is saved with the run and named in an event; the weights are what they "
    "would have been",
    without=without_retry,
)
@both_memories
def test_a_run_settles_on_smaller_packs(arguments, monkeypatch, run_out, tmp_path):
    whole = outcome_of(arguments(**VALUES, output_dir=str(tmp_path / "whole")))
    too_little_memory(monkeypatch, run_out, tokens=150, training=True)
    args = arguments(**VALUES)
    outcome = outcome_of(args)
    assert outcome.code == 0 and outcome.count("out_of_memory") >= 1
    state = json.loads((Path(args.output_dir) / "checkpoint-3/state.json").read_text())
    assert state["max_tokens_per_pack"] == outcome.events[-1]["max_tokens_per_pack"]
    weights = [name for name in whole.tensors if name.startswith(("projector", "adapter"))]
    # Three AdamW steps of 1e-2 at most, each with gradients that differ by roundings alone.
    assert all(torch.allclose(whole.tensors[n], outcome.tensors[n], atol=3e-3) for n in weights)


@fault(
    "one sample that does not fit by itself",
    of="memory",
    guarantee="exit code 4; the message names the sample, its length and the flags that help",
    without=without_retry,
)
@both_memories
def test_a_sample_too_long(arguments, monkeypatch, run_out):
    too_little_memory(monkeypatch, run_out, tokens=10, training=True)
    outcome = outcome_of(arguments(**VALUES))
    assert outcome.code == 4 and "train.jsonl" in outcome.message and "--max_length" in outcome.message


@fault(
    "out of memory in a save",
    of="memory",
    guarantee="the run continues; an event names the last whole checkpoint; the next save is tried",
    without=lambda monkeypatch: monkeypatch.setattr(
        loop, "try_to_save", lambda run, *, stopped=False: bool(save_checkpoint(run))
    ),
)
@both_memories
def test_save(arguments, monkeypatch, run_out):
    honest, calls = session.write_optimizer, []

    def planted(*args):
        calls.append(1)
        if len(calls) == 2:
            run_out()
        return honest(*args)

    monkeypatch.setattr(session, "write_optimizer", planted)
    args = arguments(**VALUES | {"max_steps": 3, "save_steps": 1})
    outcome = outcome_of(args)
    assert outcome.code == 0 and outcome.finite
    assert [e["last_whole"] for e in outcome.events if e["kind"] == "save_failed"] == ["checkpoint-1"]
    assert {p.name for p in Path(args.output_dir).glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}


@fault(
    "out of memory while the models are loaded",
    of="memory",
    guarantee="exit code 4; the message names both models and the flags that help",
    without=lambda monkeypatch: monkeypatch.setattr(loading, "naming_memory_limit", lambda *_: nullcontext()),
)
@both_memories
def test_load(arguments, monkeypatch, run_out):
    monkeypatch.setattr(loading, "load_language_model", run_out)
    args = arguments(**VALUES)
    outcome = outcome_of(args)
    assert outcome.code == 4 and "--load_in_4bit" in outcome.message and args.text_model in outcome.message


def test_an_adapter_that_no_memory_could_hold(arguments):
    args = arguments(**VALUES)
    object.__setattr__(
        args, "lora_r", 2**50
    )  # beyond any address space; a flag may not be as high; with a large model less is too much
    outcome = outcome_of(args)
    assert outcome.code == 4 and "--lora_r" in outcome.message
    assert "--resume_from_checkpoint" not in outcome.message, "there is nothing to go on with"


@fault(
    "out of memory in the optimizer's step",
    of="memory",
    guarantee="exit code 4 with the flags that help and the command that resumes; the last checkpoint is whole",
    without=lambda monkeypatch: monkeypatch.setattr(train_run, "MemoryLimitError", RuntimeError),
)
@both_memories
def test_optimizer(arguments, monkeypatch, run_out):
    honest, calls = torch.optim.AdamW.step, []

    def planted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            run_out()
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", planted)
    args = arguments(**VALUES | {"max_steps": 3, "save_steps": 1})
    outcome = outcome_of(args)
    assert outcome.code == 4 and "--resume_from_checkpoint" in outcome.message
    newest, passed_over = newest_usable(Path(args.output_dir))
    assert newest.name == "checkpoint-2" and passed_over == []
