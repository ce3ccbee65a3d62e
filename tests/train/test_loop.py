"""One step at a time: what moves, what stays, what is written."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from qwhisper.data.loader import Rejection
from qwhisper.errors import DataError, NumericalError
from qwhisper.guards.decide import BAD, FIRST_NORMS, PEAK, NormAverage
from qwhisper.guards.state import CLAMP_CLEAN as CLEAN
from qwhisper.report.events import acts, read_jsonl
from qwhisper.train.monitor import log_window
from qwhisper.train.run import main
from tests.small import write_dialogues
from tests.test_faults.inject import gradients_times, plant
from tests.train.helpers import (
    adam_state,
    checkpoint_tensors,
    gradients,
    make_run,
    read_lines,
    same_bits,
    step,
    trainable,
)


@pytest.mark.parametrize("value", [pytest.param(math.nan, marks=pytest.mark.slow), math.inf])
def test_skipped_step_leaves_parameters_and_adam_bit_identical(arguments, monkeypatch, value):
    run, samples = make_run(arguments(freeze_projector_steps=0))
    step(run, samples[:4])
    before, adam = trainable(run), adam_state(run)
    with monkeypatch.context() as patch:
        plant_gradient(run, patch, value)
        report = step(run, samples[4:8])
    assert report.skipped == "gradient of lora not finite"
    assert same_bits(before, trainable(run)) == [] and same_bits(adam, adam_state(run)) == []
    assert run.state.step == 2 and run.state.skipped_steps == 1
    event = read_lines(run.log.folder / "events.jsonl")[-1]
    assert event["kind"] == "skipped" and event["samples"] == [s.id for s in samples[4:8]]
    assert step(run, samples[8:]).skipped is None
    assert same_bits(before, trainable(run)) != []


def plant_gradient(run, monkeypatch, value: float, sample_id: str | None = None) -> None:
    """Puts `value` into one LoRA gradient after each backward pass, or after those that have the sample in them."""
    honest = run.executor.forward_backward

    def planted(samples, count):
        result = honest(samples, count)
        if sample_id is None or any(sample.id == sample_id for sample in samples):
            next(p for p in run.groups["lora"] if p.grad is not None).grad.view(-1)[3] = value
        return result

    monkeypatch.setattr(run.executor, "forward_backward", planted)


def step_gradients(run, monkeypatch, samples) -> dict:
    """The gradients that the optimizer is given."""
    seen = {}
    monkeypatch.setattr(run.optimizer, "step", lambda: seen.update(gradients(run)))
    step(run, samples)
    return seen


def test_a_bad_sample_is_dropped_and_named_and_the_rest_is_the_step_without_it(arguments, monkeypatch):
    values = {"freeze_projector_steps": 0, "dtype": "fp32", "max_grad_norm": 0.0}
    run, samples = make_run(arguments(**values))
    with monkeypatch.context() as patch:
        expected = step_gradients(run, patch, [samples[0], samples[1], samples[3]])
    run, samples = make_run(arguments(**values))
    plant_gradient(run, monkeypatch, math.nan, samples[2].id)
    given = step_gradients(run, monkeypatch, samples[:4])
    largest = max(float(g.abs().max()) for g in expected.values())
    assert given.keys() == expected.keys()
    # Sums of a few thousand fp32 products in another order, as for packings (test_executor).
    assert max(float((given[n] - expected[n]).abs().max()) for n in expected) <= 1e-5 * largest
    event = read_lines(run.log.folder / "events.jsonl")[-1]
    assert event["kind"] == "dropped_samples" and event["kept"] == 3
    assert [(s["id"], s["not_finite"]) for s in event["samples"]] == [(samples[2].id, "gradient of lora")]
    assert run.state.supervised_tokens == sum(s.num_supervised for s in samples[:4]) - samples[2].num_supervised
    assert run.state.guards.bad_steps_in_a_row == 0 and run.state.skipped_steps == 0


def test_what_does_not_happen_again_costs_no_sample(arguments, monkeypatch):
    run, samples = make_run(arguments())
    honest, calls = run.executor.forward_backward, []

    def once(given, count):
        result = honest(given, count)
        if not calls:
            next(p for p in run.groups["lora"] if p.grad is not None).grad.view(-1)[0] = math.nan
        calls.append(len(given))
        return result

    monkeypatch.setattr(run.executor, "forward_backward", once)
    report = step(run, samples[:4])
    assert calls == [4, 1, 1, 1, 1] and report.skipped is None
    assert report.tokens == sum(s.num_supervised for s in samples[:4])
    assert [e["kind"] for e in read_lines(run.log.folder / "events.jsonl")] == ["not_repeated"]


def test_bad_steps_in_a_row_rewind_to_the_snapshot_at_half_the_rate_and_the_data_goes_on(arguments, monkeypatch):
    run, samples = make_run(arguments(max_bad_steps=2, early_lr_steps=0, lr_scheduler_type="constant"))
    run.snapshots.take(0)
    before, rate = trainable(run), run.optimizer.param_groups[0]["lr"]
    step(run, samples[:4])
    assert same_bits(before, trainable(run)) != []
    plant_gradient(run, monkeypatch, math.nan)
    for index in range(2):
        step(run, samples[4 * index : 4 * index + 4])
    assert same_bits(before, trainable(run)) == [] and run.state.step == 3
    assert [group["lr"] for group in run.optimizer.param_groups] == [rate / 2] * 2
    run.scheduler.step()
    assert run.optimizer.param_groups[0]["lr"] == rate / 2
    event = read_lines(run.log.folder / "events.jsonl")[-1]
    assert (event["kind"], event["to_step"], event["bad_steps"]) == ("rewind", 0, 2)
    assert event["samples"] == [s.id for s in samples[4:8]]


def test_after_the_last_rewind_the_run_ends_with_exit_code_5(arguments, monkeypatch):
    from qwhisper.engine import executor

    def lost(step):
        return dataclasses.replace(step, loss=step.loss * math.nan)

    honest = executor.Executor.run_packs
    monkeypatch.setattr(executor.Executor, "run_packs", lambda self, s, n: lost(honest(self, s, n)))
    args = arguments(max_bad_steps=2, max_rewinds=1, per_device_train_batch_size=1)
    with pytest.raises(NumericalError, match="dead at step 4 after 1 rewinds") as caught:
        main(args)
    assert caught.value.exit_code == 5
    events = read_lines(Path(args.output_dir) / "events.jsonl")
    assert events[-1]["kind"] == "end" and events[-1]["exit_code"] == 5 and "dead at step 4" in events[-1]["reason"]
    kinds = [event["kind"] for event in acts(events) if "clamp" not in event["kind"]]
    twice = ["dropped_samples", "skipped"] * 2
    assert kinds == [*twice, "rewind", *twice]


def test_a_weight_that_is_not_finite_rewinds_at_once(arguments):
    run, samples = make_run(arguments())
    run.snapshots.take(0)
    before = trainable(run)
    with torch.no_grad():
        run.groups["lora"][0].view(-1)[0] = math.nan
    report = step(run, samples[:4])
    assert report.skipped is not None and "weights of lora" in report.skipped
    assert same_bits(before, trainable(run)) == []


@pytest.mark.parametrize("largest", [1e-4, 1e9])
def test_a_peak_is_brought_down_to_three_averages_and_a_spike_is_named(arguments, monkeypatch, largest):
    run, samples = make_run(arguments(max_grad_norm=0.0, lora_grad_clip=0.0))
    run.state.guards.averages["lora"] = NormAverage(mean=1e-4, first=[1e-4] * FIRST_NORMS, largest=largest)
    given = step_gradients(run, monkeypatch, samples[:4])
    norm = torch.stack([g.norm() for name, g in given.items() if "lora" in name]).norm()
    assert float(norm) == pytest.approx(PEAK * 1e-4, rel=1e-5)
    events = read_jsonl(run.log.folder / "events.jsonl")
    if largest == 1e9:  # such norms are ordinary in that run
        assert events == []
    else:
        assert events[-1]["kind"] == "gradient_spike" and events[-1]["times_average"]["lora"] > PEAK * BAD
        assert events[-1]["samples"] == [s.id for s in samples[:4]]


def test_half_precision_overflow_shrinks_the_loss_scale_and_repeats_the_step(arguments, monkeypatch):
    run, samples = make_run(arguments(dtype="fp16", freeze_projector_steps=0))
    assert run.executor.half_precision
    honest, scales = run.executor.forward_backward, []

    def overflowing(given, count):
        scales.append(run.executor.loss_scale)
        result = honest(given, count)
        if run.executor.loss_scale > 2**10:
            next(p for p in run.groups["lora"] if p.grad is not None).grad.view(-1)[0] = math.inf
        return result

    monkeypatch.setattr(run.executor, "forward_backward", overflowing)
    report = step(run, samples[:4])
    assert scales == [2.0**15, 2.0**13, 2.0**11, 2.0**9] and report.skipped is None
    assert run.state.guards.bad_steps_in_a_row == 0 and read_jsonl(run.log.folder / "events.jsonl") == []


def test_the_loss_scale_leaves_no_trace_in_the_gradients(arguments):
    run, samples = make_run(arguments(dtype="fp32", freeze_projector_steps=0))
    run.executor.forward_backward(samples[:4], 10)
    expected = gradients(run)
    run.executor.model.zero_grad(set_to_none=True)
    run.executor.loss_scale = 2.0**12  # a power of two: nothing is rounded
    run.executor.forward_backward(samples[:4], 10)
    assert same_bits(expected, gradients(run)) == []


def test_projector_is_bit_identical_through_step_n_and_moves_at_n_plus_1(arguments):
    run, samples = make_run(arguments(freeze_projector_steps=2))
    projector = run.executor.model.model.multi_modal_projector
    start = {k: v.clone() for k, v in projector.state_dict().items()}
    for index in range(2):
        step(run, samples[4 * index : 4 * index + 4])
        assert same_bits(start, projector.state_dict()) == []
    assert all(p.requires_grad for p in projector.parameters())
    step(run, samples[8:])
    assert same_bits(start, projector.state_dict()) != []


def test_lora_moves_from_the_first_step(arguments):
    run, samples = make_run(arguments())
    before = trainable(run)
    step(run, samples[:4])
    moved = same_bits(before, trainable(run))
    assert moved and all("lora_B" in name for name in moved)  # A's gradient is exactly zero while B is


def test_base_weights_never_move(arguments):
    run, samples = make_run(arguments(freeze_projector_steps=0))
    frozen = {n: p.clone() for n, p in run.executor.model.named_parameters() if not p.requires_grad}
    for index in range(3):
        step(run, samples[4 * index : 4 * index + 4])
    now = {n: p for n, p in run.executor.model.named_parameters() if not p.requires_grad}
    assert same_bits(frozen, now) == []


def test_lora_clip_acts_on_loras_norm_alone(arguments, monkeypatch):
    bound = 1e-3
    run, samples = make_run(arguments(freeze_projector_steps=0, lora_grad_clip=bound, max_grad_norm=0.0))
    seen = {}

    def norms(*args, **kwargs):
        for name, parameters in run.groups.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            seen[name] = float(torch.stack([g.norm() for g in grads]).norm())

    monkeypatch.setattr(run.optimizer, "step", norms)
    report = step(run, samples[:4])
    assert report.group_norms["lora"] > bound
    assert seen["lora"] == pytest.approx(bound, rel=1e-5)
    assert seen["projector"] == pytest.approx(report.group_norms["projector"], rel=1e-6)


def test_global_clip_comes_after_the_groups_and_bounds_them_together(arguments, monkeypatch):
    run, samples = make_run(arguments(freeze_projector_steps=0, lora_grad_clip=1e-2, max_grad_norm=1e-3))
    seen = []

    def norm(*args, **kwargs):
        grads = [p.grad for parameters in run.groups.values() for p in parameters if p.grad is not None]
        seen.append(float(torch.stack([g.norm() for g in grads]).norm()))

    monkeypatch.setattr(run.optimizer, "step", norm)
    step(run, samples[:4])
    assert seen == [pytest.approx(1e-3, rel=1e-5)]


def test_a_step_without_samples_is_skipped_and_named(arguments):
    run, _ = make_run(arguments(max_bad_fraction=1.0))
    before = trainable(run)
    report = step(run, [], [Rejection("d9", "train.jsonl:9", "unreadable")])
    assert report.skipped == "no sample left" and same_bits(before, trainable(run)) == []
    assert read_lines(run.log.folder / "quarantine.jsonl") == [
        {"id": "d9", "source": "train.jsonl:9", "reason": "unreadable", "step": 0}
    ]
    assert run.state.guards.bad_steps_in_a_row == 0


def test_bad_clips_are_quarantined_and_too_many_end_the_run(arguments, tmp_path):
    data = write_dialogues(tmp_path / "data", 12)
    (tmp_path / "data/clip3.wav").write_bytes(b"RIFF, but nothing else")
    args = arguments(train_file=str(data), max_bad_fraction=0.1, max_steps=3)
    assert main(args) == 0
    lines = read_lines(Path(args.output_dir) / "quarantine.jsonl")
    assert [line["id"] for line in lines] == ["d3"] and "clip3.wav" in lines[0]["reason"]
    with pytest.raises(DataError, match="max_bad_fraction") as caught:
        main(arguments(train_file=str(data), max_bad_fraction=0.01, output_dir=str(tmp_path / "strict"), max_steps=3))
    assert caught.value.exit_code == 3


def test_metrics_have_every_step_with_its_label_count_and_rates(run_training):
    args = run_training(max_steps=4, projector_learning_rate=5e-2, early_lr_steps=2, lr_scheduler_type="constant")
    lines = read_lines(Path(args.output_dir) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["valid_label_count"] > 0 and math.isfinite(line["loss"]) for line in lines)
    assert [line["learning_rate_lora"] for line in lines] == pytest.approx([2e-3, 2e-3, 1e-2, 1e-2])
    assert [line["learning_rate_projector"] for line in lines] == pytest.approx([1e-2, 1e-2, 5e-2, 5e-2])


def test_evaluation_keeps_the_best_checkpoint(run_training, train_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which step is the best depends on the device
    args = run_training(
        eval_file=str(train_file), max_steps=4, save_steps=1, save_total_limit=2,
        learning_rate=0.3, early_lr_steps=0, freeze_projector_steps=0, lr_scheduler_type="constant",
    )  # fmt: skip
    folder = Path(args.output_dir)
    losses = {line["step"]: line["eval_loss"] for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line}
    assert list(losses) == list(range(5))
    best = min(list(losses)[1:], key=losses.get)  # before the first step there is nothing to save
    kept = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
    assert best == 2 and kept == [2, 3, 4]


def test_unfrozen_encoder_learns_and_is_saved(run_training):
    args = run_training(freeze_whisper=False, max_steps=2, save_steps=1, freeze_projector_steps=0)
    first, second = (checkpoint_tensors(Path(args.output_dir) / f"checkpoint-{n}") for n in (1, 2))
    assert any("audio_tower" in name for name in first) and same_bits(first, second)
    assert (Path(args.output_dir) / "checkpoint-2/encoder.safetensors").exists()


def test_a_clamp_that_clamps_nothing_says_so_once_when_it_goes_off(arguments):
    run, samples = make_run(arguments(activation_clamp="auto"))
    switch = run.state.guards.clamp
    switch.on, switch.step, run.clamp.on = True, CLEAN - 2, True
    log_window(run, [step(run, samples[:4])], 1e-3)
    assert read_jsonl(run.log.folder / "events.jsonl") == []
    switch.clamped = switch.told = 7  # earlier, by what those events said
    step(run, samples[4:8])
    (event,) = read_jsonl(run.log.folder / "events.jsonl")
    assert (event["kind"], event["turned"], event["values"]) == ("activation_clamp", "off", 7) and not run.clamp.on


def test_an_ordinary_peak_is_a_metric_and_no_event_and_the_closing_line_knows_it(arguments, capsys, monkeypatch):
    plant(monkeypatch, gradients_times(10.0), calls=range(FIRST_NORMS + 2, FIRST_NORMS + 3))
    args = arguments(max_steps=FIRST_NORMS + 4, save_steps=100, logging_steps=100, per_device_train_batch_size=1)
    assert main(args) == 0
    folder = Path(args.output_dir)
    peaks = {line["step"] for line in read_lines(folder / "metrics.jsonl") if "peak_lora" in line}
    assert FIRST_NORMS + 3 in peaks and acts(read_jsonl(folder / "events.jsonl")) == []
    assert "No guard had to act" in capsys.readouterr().out
