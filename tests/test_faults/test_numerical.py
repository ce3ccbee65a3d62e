"""Numbers that go wrong: in a loss, a gradient, a weight, the optimizer, for one sample, a step, or for good."""

import dataclasses
import math
from pathlib import Path

import torch

from qwhisper.checkpoint.reading import choose_checkpoint
from qwhisper.engine.executor import Executor
from qwhisper.guards import decide as averages
from qwhisper.guards import snapshot
from qwhisper.guards import state as ladder
from qwhisper.guards.decide import StepStatistics
from qwhisper.guards.state import LossScale
from qwhisper.model import loading
from qwhisper.model.bases import load_encoder
from qwhisper.model.half_precision import OverflowClamp
from qwhisper.report.events import read_jsonl
from qwhisper.train import loop, state
from qwhisper.train.session import save_checkpoint
from tests.test_faults.inject import gradient_element, gradients_times, loss_times, outcome_of, plant
from tests.test_faults.matrix import fault
from tests.train.helpers import adam_state, make_run, read_lines, same_bits, step, trainable

BAD = {"d3"}
ONE_EPOCH = {"max_steps": 3, "save_steps": 3, "freeze_projector_steps": 0, "early_lr_steps": 0}


def without_finite_check(monkeypatch) -> None:
    monkeypatch.setattr(StepStatistics, "not_finite", property(lambda self: []))


def without_dropping(monkeypatch) -> None:
    monkeypatch.setattr(loop, "drop_bad_samples", lambda run, samples, statistics: ([], statistics))


def without_averages(monkeypatch) -> None:
    monkeypatch.setattr(averages.NormAverage, "bound", property(lambda self: math.inf))


def without_rewind(monkeypatch) -> None:
    monkeypatch.setattr(loop, "after_step", lambda *args: None)


def without_any_check(monkeypatch) -> None:
    without_finite_check(monkeypatch)
    without_rewind(monkeypatch)
    monkeypatch.setattr(loop, "keep_sound", lambda run, *, copy: None)


SAMPLE_FAULTS = {
    "NaN loss of one sample": loss_times(math.nan),
    "infinite loss of one sample": loss_times(math.inf),
    "NaN in one gradient element of one sample": gradient_element(math.nan),
    "infinity in one gradient element of one sample": gradient_element(-math.inf),
    "gradients of 1e30 from one sample": gradients_times(1e30),
}


def dropped(run) -> set[str]:
    events = read_jsonl(run.log.folder / "events.jsonl")
    return {sample["id"] for event in events if event["kind"] == "dropped_samples" for sample in event["samples"]}


def declare(name: str, effect) -> None:
    """One test a fault, each with its injection and the three steps of an epoch."""

    @fault(
        name,
        of="numerical",
        guarantee="the sample is dropped and named, the rest of its step is taken, weights stay finite",
        without=without_finite_check,
    )
    def weights_stay_finite(arguments, monkeypatch):
        run, samples = make_run(arguments(**ONE_EPOCH))
        plant(monkeypatch, effect, samples=BAD)
        reports = [step(run, samples[first : first + 4]) for first in (0, 4, 8)]
        assert all(torch.isfinite(t).all() for t in (trainable(run) | adam_state(run)).values())
        assert dropped(run) == BAD and all(report.skipped is None for report in reports)

    globals()["test_" + name.replace(" ", "_").lower()] = weights_stay_finite


for _name, _effect in SAMPLE_FAULTS.items():
    declare(_name, _effect)


@fault(
    "a bad sample in a step of four",
    of="numerical",
    guarantee="the other three are trained on, weighted by their tokens",
    without=without_dropping,
)
def test_the_rest_of_the_step_is_not_lost(arguments, monkeypatch):
    run, samples = make_run(arguments(**ONE_EPOCH))
    plant(monkeypatch, loss_times(math.nan), samples={samples[0].id})
    before = trainable(run)
    report = step(run, samples[:4])
    assert report.skipped is None and same_bits(before, trainable(run)) != []
    assert report.tokens == sum(s.num_supervised for s in samples[1:4])


@fault(
    "a gradient that is NaN once, and not when run again",
    of="numerical",
    guarantee="no sample is lost: the second result is taken, one event says so",
    without=without_dropping,
)
def test_what_is_not_repeated_costs_nothing(arguments, monkeypatch):
    plant(monkeypatch, gradient_element(math.nan), calls=range(1, 2))
    outcome = outcome_of(arguments(**ONE_EPOCH))
    assert outcome.code == 0 and outcome.finite
    assert outcome.count("not_repeated") == 1 and outcome.count("skipped") == 0


@fault(
    "every sample of a step bad",
    of="numerical",
    guarantee="parameters, moments and Adam's step counts stay bit-identical; the step is named",
    # What frameworks do: the bad gradients become zeros, and AdamW moves on its momentum.
    without=lambda monkeypatch: monkeypatch.setattr(loop, "drop_bad_samples", zeroed_gradients),
)
def test_a_skipped_step_moves_nothing(arguments, monkeypatch):
    run, samples = make_run(arguments(**ONE_EPOCH))
    step(run, samples[:4])
    before, adam = trainable(run), adam_state(run)
    plant(monkeypatch, gradient_element(math.nan))
    step(run, samples[4:8])
    assert same_bits(before, trainable(run)) == [] and same_bits(adam, adam_state(run)) == []
    assert read_lines(run.log.folder / "events.jsonl")[-1]["samples"] == [s.id for s in samples[4:8]]


def zeroed_gradients(run, samples, statistics):
    for parameters in run.groups.values():
        for p in parameters:
            p.grad = torch.zeros_like(p)
    return samples, StepStatistics(0.0, dict.fromkeys(run.groups, 0.0))


@fault(
    "a gradient peak of 1e6",
    of="numerical",
    guarantee="it is brought down to three times the group's average: neither it nor the steps after it, which AdamW's "
    "second moment would stall, move the weights much more or less than others do",
    without=without_averages,
)
def test_a_peak_moves_the_weights_like_other_steps_and_stalls_none_after_it(arguments, monkeypatch):
    values = ONE_EPOCH | {"max_grad_norm": 0.0, "lora_grad_clip": 0.0, "lr_scheduler_type": "constant"}
    run, samples = make_run(arguments(**values, learning_rate=1e-4))
    moved = []
    for index in range(50):
        if index == 30:
            plant(monkeypatch, gradients_times(1e6), calls=range(1))
        before = trainable(run)
        step(run, samples[4 * (index % 3) : 4 * (index % 3) + 4])
        after = trainable(run)
        moved.append(math.sqrt(sum(float((after[n] - before[n]).norm()) ** 2 for n in after)))
    median = sorted(moved[20:30])[5]
    assert max(moved[30:]) <= 3 * median and min(moved[30:]) >= median / 3


@fault(
    "a non-finite norm among those that an adaptive bound is made of",
    of="numerical",
    guarantee="the average is never fed with it, and the bound keeps working",
    without=lambda monkeypatch: monkeypatch.setattr(ladder.GuardState, "feed", feed_everything),
)
def test_the_average_is_never_fed_with_what_is_not_finite(arguments, monkeypatch):
    run, samples = make_run(arguments(**ONE_EPOCH))
    for index in range(3):
        with monkeypatch.context() as patch:
            if index == 1:
                plant(patch, gradient_element(math.nan))
            step(run, samples[:4])
    average = run.state.guards.averages["lora"]
    assert all(math.isfinite(norm) for norm in average.first) and len(average.first) == 2


def feed_everything(self, statistics, decision):
    for name, norm in statistics.gradients.items():
        self.averages.setdefault(name, averages.NormAverage()).first.append(norm)


@fault(
    "NaN in a weight",
    of="numerical",
    guarantee="found and named at the next step; weights and moments go back to the snapshot; training continues",
    without=without_rewind,
)
def test_a_broken_weight_is_rewound(arguments):
    run, samples = make_run(arguments(**ONE_EPOCH))
    run.snapshots.take(0)
    step(run, samples[:4])
    with torch.no_grad():
        run.groups["projector"][0].view(-1)[0] = math.nan
    step(run, samples[4:8])
    assert all(torch.isfinite(p).all() for p in trainable(run).values())
    assert step(run, samples[8:]).skipped is None
    assert "weights of projector" in read_lines(run.log.folder / "events.jsonl")[0]["reason"]


@fault(
    "NaN in Adam's second moment",
    of="numerical",
    guarantee="the weights that it breaks are found one step later; weights and moments go back to the snapshot",
    without=without_rewind,
)
def test_a_broken_moment_is_rewound(arguments):
    run, samples = make_run(arguments(**ONE_EPOCH))
    step(run, samples[:4])
    run.snapshots.take(1)
    next(iter(run.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.nan
    for index in (1, 2):
        step(run, samples[4 * index : 4 * index + 4])
    assert all(torch.isfinite(p).all() for p in trainable(run).values())
    assert all(torch.isfinite(value).all() for value in adam_state(run).values())


@fault(
    "a snapshot that would be poisoned",
    of="numerical",
    guarantee="it is not taken; the older one is what a rewind finds",
    without=lambda monkeypatch: monkeypatch.setattr(snapshot, "all_finite", lambda tensors: True),
)
def test_a_poisoned_snapshot_is_not_taken(arguments):
    run, _ = make_run(arguments(**ONE_EPOCH))
    run.snapshots.take(0)
    with torch.no_grad():
        run.groups["lora"][0].view(-1)[0] = math.nan
    run.snapshots.take(1)
    assert run.snapshots.restore() == 0


@fault(
    "a few bad steps in a row",
    of="numerical",
    guarantee="fewer than --max_bad_steps cost only those steps: no rewind, learning rate unchanged",
    without=lambda monkeypatch: monkeypatch.setattr(
        ladder.GuardState, "next_act", lambda self, s, **limits: "rewind" if self.bad_steps_in_a_row else "go on"
    ),
)
def test_a_few_bad_steps_are_no_reason_to_rewind(arguments, monkeypatch):
    run, samples = make_run(arguments(**ONE_EPOCH, max_bad_steps=3))
    run.snapshots.take(0)
    step(run, samples[:4])
    before = trainable(run)
    with monkeypatch.context() as patch:
        plant(patch, gradient_element(math.nan))
        for _ in range(2):
            step(run, samples[:4])
    assert same_bits(before, trainable(run)) == [] and run.state.guards.rewinds == 0
    assert run.state.guards.lr_factor == 1.0


@fault(
    "bad steps that do not end by themselves",
    of="numerical",
    guarantee="after --max_bad_steps the weights go back to a snapshot at half the rate, and the run recovers",
    without=without_rewind,
)
def test_a_rewind_revives_a_run_whose_weights_were_the_trouble(arguments, monkeypatch):
    run, samples = make_run(arguments(**ONE_EPOCH, max_bad_steps=2))
    run.snapshots.take(0)
    start, honest = trainable(run), run.executor.forward_backward

    def bad_away_from_the_start(given, count):
        result = honest(given, count)
        if same_bits(start, trainable(run)):
            gradient_element(math.nan)(run.executor, result.loss)
        return result

    step(run, samples[:4])
    monkeypatch.setattr(run.executor, "forward_backward", bad_away_from_the_start)
    reports = [step(run, samples[:4]) for _ in range(3)]
    assert [report.skipped is None for report in reports] == [False, False, True]


@fault(
    "a run that is bad again after every rewind",
    of="numerical",
    guarantee="it ends with exit code 5 after --max_rewinds, and its last sound checkpoint is still there",
    without=without_rewind,
)
def test_a_dying_run_ends_and_keeps_its_last_sound_checkpoint(arguments, monkeypatch):
    plant(monkeypatch, gradient_element(math.nan), calls=range(3, 10**6))
    args = arguments(
        **ONE_EPOCH | {"max_steps": 60, "save_steps": 1}, save_total_limit=1, max_bad_steps=2, max_rewinds=1
    )
    outcome = outcome_of(args)
    assert outcome.code == 5 and outcome.finite and " is sound: resume it" in outcome.message


@fault(
    "weights that are not finite at a save",
    of="numerical",
    guarantee="no older checkpoint is deleted",
    without=lambda monkeypatch: monkeypatch.setattr(snapshot.Snapshots, "sound", lambda snapshots: True),
)
def test_a_broken_checkpoint_rotates_nothing_away(arguments):
    run, samples = make_run(arguments(**ONE_EPOCH, save_total_limit=1))
    step(run, samples[:4])
    save_checkpoint(run)
    with torch.no_grad():
        run.groups["lora"][0].view(-1)[0] = math.nan
    run.state.step += 1
    save_checkpoint(run)
    assert (Path(run.args.output_dir) / "checkpoint-1").is_dir()


@fault(
    "a learning rate so high that the weights blow up",
    of="numerical",
    guarantee="the run ends with finite weights, and with exit code 5 or 7, not in success",
    without=without_any_check,
)
def test_a_rate_that_blows_up_leaves_finite_weights(arguments):
    values = ONE_EPOCH | {"max_steps": 12, "save_steps": 1, "max_grad_norm": 0.0}
    args = arguments(**values, max_bad_steps=2)
    for name in ("learning_rate", "projector_learning_rate"):
        object.__setattr__(args, name, 1e18)  # a flag may not be as high, but a callback can do what it likes
    outcome = outcome_of(args)
    assert outcome.code in (5, 7) and outcome.finite


@fault(
    "fp16 gradients that overflow",
    of="numerical",
    guarantee="the loss scale shrinks and the same samples are run again: nothing is dropped, no step counts as bad",
    without=lambda monkeypatch: monkeypatch.setattr(LossScale, "shrink", lambda self: False),
)
def test_overflow_of_fp16_costs_no_sample(arguments, monkeypatch):
    run, samples = make_run(arguments(**ONE_EPOCH, dtype="fp16"))
    overflow = gradient_element(math.inf)
    plant(monkeypatch, lambda executor, loss: overflow(executor, loss) if executor.loss_scale > 2**8 else None)
    report = step(run, samples[:4])
    assert report.skipped is None and report.tokens == sum(s.num_supervised for s in samples[:4])
    assert run.state.guards.loss_scale.scale <= 2**8


@fault(
    "values that overflow in an fp16 encoder",
    of="numerical",
    guarantee="bounded, counted and named by module; the step is taken with all of its samples",
    without=lambda monkeypatch: monkeypatch.setattr(OverflowClamp, "clamp_output", lambda self, *args: None),
)
def test_overflow_in_the_encoder(arguments, monkeypatch):
    def with_large_weights(*args, **kwargs):
        encoder = load_encoder(*args, **kwargs)
        with torch.no_grad():
            encoder.layers[0].fc1.weight.mul_(1e7).clamp_(-6e4, 6e4)
        return encoder

    monkeypatch.setattr(loading, "load_encoder", with_large_weights)
    outcome = outcome_of(arguments(**ONE_EPOCH, dtype="fp16", logging_steps=1))
    assert outcome.code == 0 and outcome.count("dropped_samples") == outcome.count("skipped") == 0
    overflows = [event["values"] for event in outcome.events if event["kind"] == "encoder_overflow"]
    assert overflows and all(values["layers.0.fc1"] > 0 for values in overflows)


def guards_forget(monkeypatch) -> None:
    honest = state.from_json
    monkeypatch.setattr(
        state, "from_json", lambda cls, values: dataclasses.replace(honest(cls, values), guards=ladder.GuardState())
    )


@fault(
    "a resume after bad steps",
    of="numerical",
    guarantee="averages, rewinds and the halved learning rate are what they were",
    without=guards_forget,
)
def test_the_guards_memory_survives_a_resume(arguments, tmp_path):
    run, samples = make_run(arguments(**ONE_EPOCH))
    step(run, samples[:4])
    run.state.guards.rewound()
    run.state.write(tmp_path)
    assert type(run.state).load(tmp_path) == run.state


@fault(
    "a held-out loss that is NaN, at the first evaluation",
    of="numerical",
    guarantee="it never counts as the best: a later finite one does, and its checkpoint is kept",
    without=lambda monkeypatch: monkeypatch.setattr(loop, "improves", lambda loss, best: best is None or loss < best),
)
def test_nan_is_never_the_best_loss(arguments, monkeypatch, train_file):
    losses = iter([5.0, math.nan, 3.0, 4.0])  # the first is of before the first step
    monkeypatch.setattr(Executor, "evaluate", lambda self, samples: next(losses))
    args = arguments(max_steps=6, save_steps=2, save_total_limit=1, eval_file=str(train_file))
    assert outcome_of(args).code == 0
    assert choose_checkpoint(args.output_dir).name == "checkpoint-4"
