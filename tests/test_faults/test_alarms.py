"""Failures that leave no NaN: the run goes on and learns nothing. An alarm says so within a few steps."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from qwhisper.checksums import changed, checksums
from qwhisper.data.loader import StepSamples
from qwhisper.data.rows import IGNORE
from qwhisper.guards.alarms import STEPS_UNTIL_MOVED, STEPS_WITHOUT_GRADIENT, Alarm, Alarms, StepFacts
from qwhisper.guards.gradients import frozen_parameters, group_checksums
from qwhisper.train.loop import train_step
from tests.test_faults.matrix import WithoutGuard, fault
from tests.train.helpers import make_run
from tests.train.listeners import listening_arguments, train_and_probe, with_exchanged_clips


def without(check: str) -> WithoutGuard:
    """Patches one alarm's check out."""
    return lambda patch: patch.setattr(Alarms, check, lambda self, facts: {})


@pytest.fixture
def run(arguments):
    """(run, samples) on small bases, the projector free from the first step on."""
    return make_run(arguments(freeze_projector_steps=0, max_steps=100))


def spoken(samples) -> list:
    return [sample for sample in samples if sample.windows]


def raised_by(run, steps: Sequence[list], *, look_at_weights: bool = False) -> list[Alarm]:
    """The alarms of training steps on the given samples."""
    alarms, raised = Alarms(), []
    for samples in steps:
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        report = train_step(run, StepSamples(samples, []))
        facts = StepFacts(
            step=run.state.step,
            loss=report.loss,
            tokens=report.tokens,
            num_samples=len(samples),
            has_audio=any(sample.windows for sample in samples),
            skipped=report.skipped is not None,
            group_norms=report.group_norms,
            learning_rates=rates,
            weight_checksums=group_checksums(run.groups) if look_at_weights else {},
        )
        raised += alarms.observe(facts)
    return raised


def kinds(raised: list[Alarm]) -> list[tuple[str, str]]:
    return [(alarm.kind, alarm.about) for alarm in raised]


def change_loss(run, monkeypatch, change) -> None:
    honest = run.executor.model.forward

    def forward(*args, **kwargs):
        output = honest(*args, **kwargs)
        output.loss = change(output.loss)
        return output

    monkeypatch.setattr(run.executor.model, "forward", forward)


def test_a_sound_run_raises_no_alarm(run):
    run, samples = run
    text_only = [sample for sample in samples if not sample.windows]
    frozen = checksums(frozen_parameters(run.executor.model))
    steps = [samples[:4], text_only, text_only, text_only, *[samples[4:8]] * STEPS_UNTIL_MOVED]
    assert raised_by(run, steps, look_at_weights=True) == []
    assert changed(frozen, checksums(frozen_parameters(run.executor.model))) == []


@fault(
    "the loss is detached from the graph",
    of="numerical",
    guarantee=f"an alarm names every group without gradient after {STEPS_WITHOUT_GRADIENT} steps",
    without=without("zero_gradients"),
)
def test_loss_without_graph(guard, run, monkeypatch):
    run, samples = run
    change_loss(run, monkeypatch, lambda loss: loss.detach())
    raised = raised_by(run, [spoken(samples)[:2]] * STEPS_WITHOUT_GRADIENT)
    assert kinds(raised) == [("gradient_zero", "lora"), ("gradient_zero", "projector")]


@fault(
    "all labels are masked",
    of="numerical",
    guarantee="an alarm at that step; weights are untouched",
    without=without("masked_labels"),
)
def test_rows_masked_whole(guard, run):
    run, samples = run
    masked = [dataclasses.replace(s, labels=np.full_like(s.labels, IGNORE), answer_spans=[]) for s in samples[:4]]
    assert raised_by(run, [samples[:4]]) == []
    before = group_checksums(run.groups)
    assert kinds(raised_by(run, [masked])) == [("labels_masked", "")]
    assert group_checksums(run.groups) == before


@fault(
    "the loss is exactly 0",
    of="numerical",
    guarantee="an alarm at that step",
    without=without("zero_loss"),
)
def test_loss_of_0(guard, run, monkeypatch):
    run, samples = run
    change_loss(run, monkeypatch, lambda loss: loss * 0)
    assert kinds(raised_by(run, [samples[:4]])) == [("loss_zero", "")]


@fault(
    "the projector is cut off from the loss",
    of="numerical",
    guarantee=f"an alarm names the projector after {STEPS_WITHOUT_GRADIENT} steps with audio",
    without=without("zero_gradients"),
)
def test_projector_cut_off(guard, run, monkeypatch):
    run, samples = run
    projector = run.executor.model.model.multi_modal_projector
    honest = projector.forward
    monkeypatch.setattr(projector, "forward", lambda *args: honest(*args).detach())
    raised = raised_by(run, [spoken(samples)[:2]] * STEPS_WITHOUT_GRADIENT)
    assert kinds(raised) == [("gradient_zero", "projector")]


@fault(
    "the optimizer holds copies of a group's weights",
    of="numerical",
    guarantee="an alarm names the group at the next look at the weights",
    without=without("unmoved_weights"),
)
def test_optimizer_of_other_weights(guard, run):
    run, samples = run
    group = next(group for group in run.optimizer.param_groups if group["name"] == "projector")
    group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    raised = raised_by(run, [spoken(samples)[:2]] * (STEPS_UNTIL_MOVED + 1), look_at_weights=True)
    assert kinds(raised) == [("not_moving", "projector")]


@fault(
    "one bit of a frozen weight changes",
    of="numerical",
    guarantee="an alarm names the tensor when weights are looked at, before the next checkpoint",
    without=without("changed_base"),
)
def test_base_weight_changed(guard, run):
    run, samples = run
    model = run.executor.model
    before = checksums(frozen_parameters(model))
    train_step(run, StepSamples(samples[:2], []))
    name, weight = next((name, p) for name, p in frozen_parameters(model) if "layers.1.mlp.down_proj" in name)
    weight.detach().view(torch.int32)[3, 5] ^= 1
    found = changed(before, checksums(frozen_parameters(model)))
    raised = Alarms().observe(facts_of_a_sound_step(changed_weights=found))
    assert kinds(raised) == [("base_changed", "")] and name in raised[0].message


@pytest.fixture(scope="module")
def gain_with_clips_of_other_texts(tmp_path_factory):
    """Of a model that was trained on dialogues whose clips belong to other texts, probed on such dialogues."""
    args = listening_arguments(tmp_path_factory.mktemp("listeners"))
    files = {name: with_exchanged_clips(getattr(args, name)) for name in ("train_file", "eval_file")}
    return train_and_probe(dataclasses.replace(args, **files)).measure()


@fault(
    "the clips belong to other dialogues",
    of="numerical",
    guarantee="the listening probe finds that the true audio gains nothing, and a warning says what to try",
    without=without("deafness"),
)
def test_audio_that_says_nothing_about_the_answer(guard, gain_with_clips_of_other_texts):
    gain = gain_with_clips_of_other_texts
    raised = Alarms().observe(facts_of_a_sound_step(listening_gain=gain.gain, listening_noise=gain.noise))
    assert kinds(raised) == [("not_listening", "")] and "--projector_learning_rate" in raised[0].message


def facts_of_a_sound_step(**looked_at) -> StepFacts:
    return StepFacts(
        step=820,
        loss=1.0,
        tokens=12,
        num_samples=4,
        has_audio=True,
        skipped=False,
        group_norms={"lora": 0.5, "projector": 0.5},
        learning_rates={"lora": 3e-5, "projector": 3e-5},
        **looked_at,
    )
