"""Training on gradients in flat buffers: the same run to the last bit, in memory that stays where it is."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from qwhisper.checkpoint.names import OPTIMIZER_FILE
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.loader import StepSamples
from qwhisper.guards.gradients import drop_gradients
from qwhisper.train.loop import train_step
from qwhisper.train.models import build_model
from qwhisper.train.plan import resolve
from qwhisper.train.recovery import drop_bad_samples, num_supervised, run_samples
from qwhisper.train.session import Session, build_session, restore, save_checkpoint
from qwhisper.train.state import TrainState, read_tensors
from tests.test_faults.inject import (
    device_memory_runs_out,
    gradient_element,
    loss_times,
    plant,
)
from tests.train.helpers import adam_state, gradients, make_run, same_bits, step, trainable

FROM_THE_START = {"freeze_projector_steps": 0, "early_lr_steps": 0, "lr_scheduler_type": "constant"}
SAME_BITS = FROM_THE_START | {"device_map": "cpu"}  # attention kernels of a GPU add up in any order


def of_group(run: Session, name: str) -> dict[str, torch.Tensor]:
    """Weights, moments and step counts of one group."""
    return {
        f"{index}|{key}": tensor.detach().clone()
        for index, parameter in enumerate(run.groups[name])
        for key, tensor in ({"weight": parameter} | run.optimizer.state[parameter]).items()
    }


def text_only(samples: list) -> list:
    return [sample for sample in samples if not sample.windows]


@pytest.mark.parametrize(
    "values",
    [
        {
            "freeze_projector_steps": 2,
            "gradient_checkpointing": True,
            "lora_dropout": 0.2,
            "dtype": "bf16",
            "lora_fp32": False,
        },
        {"dtype": "fp16", "freeze_whisper": False},
    ],
    ids=["LoRA in bf16, a frozen projector and recomputed activations", "a loss scale and a trained encoder"],
)
def test_buffers_train_as_fresh_gradients_do_to_the_last_bit(arguments, tmp_path, values):
    """Six steps, of several packs each; one has text alone, and one is skipped."""

    def six_steps(name: str):
        run, samples = make_run(
            arguments(**SAME_BITS | values, max_tokens_per_pack="120", output_dir=str(tmp_path / name))
        )
        if name == "fresh":
            run.executor.gradient_buffers = None
        assert len(run.executor.packs(samples[:4])) > 1
        losses = []
        for index in range(6):
            taken = text_only(samples) if index == 3 else samples[4 * (index % 3) :][:4]
            with pytest.MonkeyPatch.context() as patch:
                if index == 4:
                    plant(patch, gradient_element(math.inf))
                    patch.setattr("qwhisper.train.loop.drop_bad_samples", lambda run, samples, failed: ([], failed))
                losses.append(step(run, taken).loss)
        assert run.state.skipped_steps == 1
        return losses, trainable(run) | adam_state(run)

    losses, bits = six_steps("buffers")
    fresh_losses, fresh_bits = six_steps("fresh")
    assert losses == fresh_losses and same_bits(bits, fresh_bits) == []


def test_without_its_bad_sample_a_step_has_the_sum_of_the_others_fresh_gradients(arguments, monkeypatch):
    run, samples = make_run(arguments(**SAME_BITS, dtype="fp32"))
    samples, bad = samples[:6], samples[3]
    run.executor.max_tokens_per_pack = 2 * max(len(sample.input_ids) for sample in samples)
    run.executor.gradient_buffers, count = None, num_supervised(samples)
    parts = [pack for pack in run.executor.packs(samples) if bad not in pack]
    parts += [[sample] for pack in run.executor.packs(samples) if bad in pack for sample in pack if sample is not bad]
    expected: dict[str, torch.Tensor] = {}
    for part in parts:
        run_samples(run, part, count)
        for name, gradient in gradients(run).items():
            expected[name] = expected[name] + gradient if name in expected else gradient
    weight = count / (count - bad.num_supervised)
    run.executor.gradient_buffers = run.gradient_buffers
    plant(monkeypatch, loss_times(math.nan), samples={bad.id})
    drop_bad_samples(run, samples, run_samples(run, samples, count)[0])
    assert same_bits({name: gradient * weight for name, gradient in expected.items()}, gradients(run)) == []
    assert_in_buffers(run)


def assert_in_buffers(run: Session) -> None:
    flat = {tensor.data_ptr() for tensor in run.gradient_buffers.flat}
    found = [p.grad for parameters in run.groups.values() for p in parameters if p.grad is not None]
    assert found and {gradient.untyped_storage().data_ptr() for gradient in found} <= flat


def frozen(run: Session) -> str:
    run.plan = dataclasses.replace(run.plan, freeze_projector_steps=100)
    return "projector"


def dropped_by_a_callback(run: Session) -> str:
    honest = run.fire

    def fire(event: str, **values) -> None:
        if event == "on_pre_optimizer_step":
            drop_gradients({"lora": run.groups["lora"]})
        honest(event, **values)

    run.fire = fire
    return "lora"


@pytest.mark.parametrize("drop", [frozen, dropped_by_a_callback])
def test_a_group_that_is_dropped_is_not_touched_and_the_other_moves(arguments, drop):
    run, samples = make_run(arguments(**FROM_THE_START))
    for _ in range(2):
        step(run, samples[:4])
    name = drop(run)
    other = next(group for group in run.groups if group != name)
    before, others = of_group(run, name), of_group(run, other)
    assert step(run, samples[4:8]).skipped is None
    assert same_bits(before, of_group(run, name)) == [] and same_bits(others, of_group(run, other)) != []


def test_a_step_of_text_alone_does_not_touch_the_projector(arguments):
    run, samples = make_run(arguments(**FROM_THE_START))
    for _ in range(2):
        step(run, samples[:4])
    before, lora = of_group(run, "projector"), of_group(run, "lora")
    assert step(run, text_only(samples)).skipped is None
    assert same_bits(before, of_group(run, "projector")) == [] and same_bits(lora, of_group(run, "lora")) != []


def test_a_skipped_step_touches_nothing_and_leaves_nothing_in_the_next(arguments, monkeypatch, tmp_path):
    ends = []
    for skip in (True, False):
        run, samples = make_run(arguments(**SAME_BITS, output_dir=str(tmp_path / str(skip))))
        step(run, samples[:4])
        if skip:
            before = trainable(run) | adam_state(run)
            with monkeypatch.context() as patch:
                plant(patch, gradient_element(math.nan))
                assert step(run, samples[4:8]).skipped
            assert same_bits(before, trainable(run) | adam_state(run)) == []
        step(run, samples[8:12])
        ends.append(trainable(run) | adam_state(run))
    assert same_bits(*ends) == []


class Addresses:
    """Where all weights and buffers, moments, gradients and their memory are: each must be found where it was first."""

    def __init__(self, run: Session):
        self.run, self.first, self.steps = run, {}, 0
        run.optimizer.register_step_pre_hook(lambda *_: self.look(gradients_too=True))

    def look(self, *, gradients_too: bool = False) -> None:
        self.steps += gradients_too
        found = {f"flat {index}": flat.data_ptr() for index, flat in enumerate(self.run.gradient_buffers.flat)}
        model = self.run.executor.model
        found |= {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        for index, parameter in enumerate(self.run.snapshots.parameters):
            found |= {f"{index}|{key}": t.data_ptr() for key, t in self.run.optimizer.state[parameter].items()}
            if gradients_too and parameter.grad is not None:
                found[f"{index}|gradient"] = parameter.grad.data_ptr()
        moved = {name for name, address in found.items() if self.first.setdefault(name, address) != address}
        assert not moved


def continued(args, folder: Path) -> tuple[Session, Addresses]:
    """The run of a checkpoint, as `qwhisper train --resume_from_checkpoint` builds it."""
    dialogues = read_dialogues(args.train_file)
    plan = resolve(args, num_dialogues=len(dialogues))
    model, processor = build_model(args, plan, folder)
    run = build_session(args, plan, model, processor, dialogues, [], TrainState.load(folder), [])
    model.train()
    addresses = Addresses(run)
    addresses.look()
    restore(run, folder)
    return run, addresses


def test_20_steps_with_a_rewind_a_halved_pack_and_a_resume_leave_all_tensors_where_they_are(arguments, monkeypatch):
    args = arguments(**FROM_THE_START, max_bad_steps=2, max_steps=20)
    run, samples = make_run(args)
    addresses = Addresses(run)
    run.snapshots.take(0)  # before any moment is there
    halved = []

    def take(index: int) -> None:
        with monkeypatch.context() as patch:
            if index in (3, 4):  # the second of them is followed by the rewind
                plant(patch, gradient_element(math.nan))
            if index in (2, 12):
                plant(patch, loss_times(math.nan), samples={samples[4 * (index % 3)].id})
            if index in (6, 14):
                backward = torch.Tensor.backward

                def once(self, *given, **values):
                    patch.setattr(torch.Tensor, "backward", backward)
                    halved.append(index)
                    device_memory_runs_out()

                patch.setattr(torch.Tensor, "backward", once)
            taken = text_only(samples) if index == 7 else samples[4 * (index % 3) :][:4]
            train_step(run, StepSamples(taken, []))
            addresses.look()

    for index in range(11):
        take(index)
    assert run.state.guards.rewinds == 1 and run.state.skipped_steps == 2
    assert addresses.steps == 9
    run, addresses = continued(args, save_checkpoint(run))
    for index in range(11, 20):
        take(index)
    assert halved == [6, 14] and run.state.step == 20 and addresses.steps == 9
    assert len(run.gradient_buffers.flat) == len(run.groups) == 2


def test_a_run_that_went_back_to_before_its_first_step_is_saved_without_moments_and_resumed(arguments, monkeypatch):
    args = arguments(**SAME_BITS, max_bad_steps=1)
    run, samples = make_run(args)
    run.snapshots.take(0)
    step(run, samples[:4])
    with monkeypatch.context() as patch:
        plant(patch, gradient_element(math.nan))
        step(run, samples[4:8])
    assert run.state.guards.rewinds == 1
    folder = save_checkpoint(run)
    assert read_tensors(folder / OPTIMIZER_FILE) == {}
    resumed, _ = continued(args, folder)
    for each in (run, resumed):
        step(each, samples[8:12])
    assert same_bits(trainable(run) | adam_state(run), trainable(resumed) | adam_state(resumed)) == []
