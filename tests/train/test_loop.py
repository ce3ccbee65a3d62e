"""One step at a time: what moves, what stays, what is written."""

import math
from pathlib import Path

import pytest
import torch

from qwhisper.errors import DataError, NumericalError
from qwhisper.train.dataset import Rejection, StepSamples
from qwhisper.train.loop import train_step
from qwhisper.train.run import main
from tests.small import write_dialogues
from tests.train.helpers import checkpoint_tensors, make_run, read_lines, same_bits, trainable


def step(run, samples, rejections=()):
    return train_step(run, StepSamples(list(samples), list(rejections), 0, 0))


def adam_state(run) -> dict:
    return {
        f"{i}|{key}": value.clone()
        for i, moments in enumerate(run.optimizer.state.values())
        for key, value in moments.items()
    }


def plant_gradient(run, monkeypatch, value: float) -> None:
    """Puts `value` into one element of one LoRA gradient after the backward pass."""
    honest = run.executor.forward_backward

    def planted(samples, num_supervised):
        result = honest(samples, num_supervised)
        next(p for p in run.groups["lora"] if p.grad is not None).grad.view(-1)[3] = value
        return result

    monkeypatch.setattr(run.executor, "forward_backward", planted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
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


def test_bad_steps_in_a_row_end_the_run_with_exit_code_5(arguments, monkeypatch):
    from qwhisper.train import executor

    honest = executor.Executor._run
    monkeypatch.setattr(executor.Executor, "_run", lambda self, s, n: honest(self, s, n) * float("nan"))
    with pytest.raises(NumericalError, match="3 steps in a row") as caught:
        main(arguments(max_bad_steps=3))
    assert caught.value.exit_code == 5


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
    assert run.state.bad_steps_in_a_row == 0


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


def test_evaluation_keeps_the_best_checkpoint(run_training, train_file):
    args = run_training(
        eval_file=str(train_file), max_steps=8, save_steps=1, save_total_limit=2,
        learning_rate=0.3, early_lr_steps=0, freeze_projector_steps=0,
    )  # fmt: skip
    folder = Path(args.output_dir)
    losses = {line["step"]: line["eval_loss"] for line in read_lines(folder / "metrics.jsonl") if "eval_loss" in line}
    assert len(losses) == 8
    best = min(losses, key=losses.get)
    kept = sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
    assert kept == sorted({7, 8, best})


def test_unfrozen_encoder_learns_and_is_saved(run_training):
    args = run_training(freeze_whisper=False, max_steps=2, save_steps=1, freeze_projector_steps=0)
    first, second = (checkpoint_tensors(Path(args.output_dir) / f"checkpoint-{n}") for n in (1, 2))
    assert any("audio_tower" in name for name in first) and same_bits(first, second)
    assert (Path(args.output_dir) / "checkpoint-2/encoder.safetensors").exists()
