"""Hugging Face's callbacks in our loop, and our callbacks and guards in a plain `Trainer`."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from qwhisper import Qwen3AudioForConditionalGeneration
from qwhisper.data.collator import ConversationCollator
from qwhisper.data.dialogue import read_dialogues
from qwhisper.errors import NothingLearnedError
from qwhisper.train import hf as hooks
from qwhisper.train.hf import (
    LoRAStabilizeCallback,
    LossDebugCallback,
    NaNMonitorCallback,
    ProjectorFreezeHook,
    guard_trainer,
)
from qwhisper.train.models import build_model
from qwhisper.train.plan import resolve
from qwhisper.train.run import main
from tests.sdpa_switches import switches, switches_of_calls
from tests.small import write_dialogues
from tests.test_faults.inject import outcome_of
from tests.train.helpers import read_lines, same_bits


def tracker_that(act) -> type[TrainerCallback]:
    return type("Leaves", (TrainerCallback,), {"on_log": lambda self, *shown, **values: act()})


def leave():
    sys.exit("login needed")


def interrupt():
    raise KeyboardInterrupt


def test_a_tracker_that_exits_is_named_and_left_out(arguments, monkeypatch, capsys):
    monkeypatch.setattr(hooks, "get_reporting_integration_callbacks", lambda names: [tracker_that(leave)])
    assert outcome_of(arguments(report_to=["broken"])).code == 0
    assert capsys.readouterr().err.count("Leaves failed in on_log (SystemExit: login needed)") == 1


def test_ctrl_c_in_a_tracker_is_not_the_trackers():
    with pytest.raises(KeyboardInterrupt):
        hooks.Tracker(tracker_that(interrupt)()).on_log()


def test_a_resumed_run_is_one_run_in_tensorboard_and_steps_taken_again_are_shown_once(arguments, tmp_path):
    held_out = write_dialogues(tmp_path / "held", 2, name="eval.jsonl")
    args = arguments(report_to=["tensorboard"], eval_file=str(held_out), max_steps=3, save_steps=2, eval_steps=2)
    folder = Path(args.output_dir)
    assert main(args) == 0
    again = dataclasses.replace(args, resume_from_checkpoint=str(folder / "checkpoint-2"), max_steps=4)
    assert main(again) == 0

    assert [path.parent.name for path in folder.rglob("events.out.tfevents.*")] == ["tensorboard"] * 2
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = shown.Scalars("train/loss")
    assert [point.step for point in losses] == [1, 2, 3, 4]
    logged = {line["step"]: line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line}
    assert [point.value for point in losses] == pytest.approx([logged[point.step] for point in losses], rel=1e-6)
    assert losses[-1].wall_time > losses[2].wall_time > losses[1].wall_time
    assert {"train/grad_norm_lora", "train/grad_norm_projector", "train/grad_norm"} <= set(shown.Tags()["scalars"])
    assert [point.step for point in shown.Scalars("eval/loss")] == [0, 2, 4]


def test_trackers_that_know_runs_by_an_id_are_told_that_of_the_run(arguments, monkeypatch):
    told = []

    class Asks(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            told.append((os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"], os.environ["SWANLAB_RUN_ID"]))
            control.should_training_stop = len(told) == 3

    args = arguments(max_steps=1)
    assert main(args, [Asks()]) == 0
    assert main(dataclasses.replace(args, resume_from_checkpoint="latest", max_steps=2), [Asks()]) == 0
    assert told[0] == told[1] and told[0][1] == "allow" and "WANDB_RUN_ID" not in os.environ
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert main(dataclasses.replace(args, output_dir=f"{args.output_dir}-2"), [Asks()]) == 0
    assert told[2][0] == "mine" and told[2][2] not in (told[0][2], "mine") and os.environ["WANDB_RUN_ID"] == "mine"


class Watch(TrainerCallback):
    """Keeps the trainable weights after every optimizer step, and the rates that the steps were taken with."""

    def __init__(self):
        self.weights, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


@pytest.fixture
def plain_trainer(arguments, train_file, tmp_path):
    """A stock Trainer with our model and collator: batch 2, accumulation 2, constant rate."""

    def make(*callbacks, **values):
        torch.manual_seed(0)
        args = arguments()
        model, processor = build_model(args, resolve(args, num_dialogues=1), None)
        collator = ConversationCollator(
            processor.tokenizer,
            processor.frames,
            audio_token_id=processor.audio_token_id,
            chat_template=processor.chat_template,
        )
        dialogues = read_dialogues(train_file)
        settings = {
            "output_dir": str(tmp_path / "hf"), "max_steps": 4,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": "none", "remove_unused_columns": False,
            "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True,
        }  # fmt: skip
        return Trainer(
            model=model, args=TrainingArguments(**settings | values), train_dataset=dialogues, data_collator=collator,
            callbacks=list(callbacks),
        )  # fmt: skip

    return make


def projector_of(weights):
    return {n: p for n, p in weights.items() if "multi_modal_projector" in n}


def start_of(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_plain_trainer_trains_model_and_collator(plain_trainer):
    trainer = plain_trainer(max_steps=6)  # two epochs
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and all(math.isfinite(x) and x > 0 for x in losses) and sum(losses[-3:]) < sum(losses[:3])


def test_plain_trainer_saves_what_it_trained(plain_trainer, tmp_path):
    trainer = plain_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.model.model.audio_tower.layers[-1].requires_grad_(True)
    trainer.model.model.language_model.norm.requires_grad_(True)
    start = start_of(trainer)
    trainer.train()
    trained = trainer.model.state_dict()
    trainer._save(str(tmp_path / "end"))
    trainer._save(str(tmp_path / "given"), trained)
    for folder in (tmp_path / "end", tmp_path / "given", tmp_path / "hf" / "checkpoint-2"):
        again = Qwen3AudioForConditionalGeneration.from_pretrained(folder).state_dict()
        assert all(torch.equal(again[name], trained[name]) for name in start)
        assert {name for name in start if torch.equal(again[name], start[name])} == set()


@pytest.mark.parametrize("implementation", [None, "sdpa"])
def test_plain_trainer_leaves_out_cudnns_attention(plain_trainer, train_file, implementation):
    trainer = plain_trainer(max_steps=1)
    if implementation:
        trainer.model.set_attn_implementation(implementation)
    with switches_of_calls() as seen:
        trainer.train()
        trainer.evaluate(trainer.train_dataset[:2])
    assert seen and not any(one["cudnn"] for one in seen)
    assert all(switches().values())


def test_projector_freeze_hook_in_a_plain_trainer(plain_trainer):
    watch = Watch()
    trainer = plain_trainer(ProjectorFreezeHook(2), watch, max_steps=3)
    start = projector_of(start_of(trainer))
    trainer.train()
    assert [bool(same_bits(start, projector_of(w))) for w in watch.weights] == [False, False, True]


def test_early_rate_in_a_plain_trainer_is_over_after_its_steps(plain_trainer):
    stabilize, watch = LoRAStabilizeCallback(early_lr_factor=0.2, early_lr_steps=2), Watch()
    trainer = plain_trainer(stabilize, watch, max_steps=3)
    trainer.train()
    assert watch.rates == pytest.approx([2e-3, 2e-3, 1e-2])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


def plant(trainer, value):
    """One non-finite element in a LoRA gradient, at the second optimizer step alone."""
    parameter = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
    parameter.register_hook(
        lambda grad: grad.index_fill(0, torch.tensor([0]), value) if trainer.state.global_step == 1 else grad
    )


def test_non_finite_gradient_leaves_the_weights_alone_in_a_plain_trainer(plain_trainer):
    # Without Trainer's own clip, which would spread the NaN before any event: trap 19.
    stabilize, watch = LoRAStabilizeCallback(early_lr_steps=0), Watch()
    trainer = plain_trainer(stabilize, watch, max_grad_norm=0.0, max_steps=3)
    plant(trainer, math.nan)
    trainer.train()
    assert same_bits(watch.weights[0], watch.weights[1]) == [] and stabilize.skipped_steps == 1
    assert same_bits(watch.weights[1], watch.weights[2]) != []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_guarded_trainer_skips_before_the_clip_can_spread_it(plain_trainer, value):
    watch = Watch()
    trainer = guard_trainer(plain_trainer(watch, max_steps=3), freeze_projector_steps=1)
    start = start_of(trainer)
    plant(trainer, value)
    trainer.train()
    assert same_bits(projector_of(start), projector_of(watch.weights[0])) == []
    assert same_bits(watch.weights[0], watch.weights[1]) == [] and trainer.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in watch.weights[-1].values())


def test_without_the_guard_the_same_gradient_is_spread_everywhere(plain_trainer):
    trainer = plain_trainer(max_steps=2)
    plant(trainer, math.nan)
    trainer.train()
    assert all(
        not torch.isfinite(p).all() for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n
    )


def test_guarded_trainer_clips_lora_alone(plain_trainer):
    trainer = guard_trainer(plain_trainer(max_steps=1, max_grad_norm=1e6), lora_grad_clip=1e-4)
    norms = {}

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for group, mark in (("lora", "lora_"), ("projector", "multi_modal_projector")):
                grads = [p.grad for n, p in model.named_parameters() if mark in n and p.grad is not None]
                norms[group] = float(torch.stack([g.norm() for g in grads]).norm())

    trainer.add_callback(Norms())
    trainer.train()
    assert norms["lora"] == pytest.approx(1e-4, rel=1e-4) and norms["projector"] > 1e-4


def test_loss_debug_reports_labels_and_loss_of_every_step_in_our_loop(arguments):
    seen = []
    args = arguments(max_steps=2)
    main(args, [LossDebugCallback(lambda *values: seen.append(values))])
    lines = read_lines(Path(args.output_dir) / "metrics.jsonl")
    assert seen == [(line["step"], line["valid_label_count"], line["loss"]) for line in lines]


def test_loss_debug_in_a_plain_trainer(plain_trainer):
    seen = []
    plain_trainer(LossDebugCallback(lambda *values: seen.append(values)), max_steps=2).train()
    assert [step for step, _, _ in seen] == [1, 2] and all(valid > 0 and loss > 0 for _, valid, loss in seen)


def test_loss_debug_in_a_plain_trainer_takes_all_micro_batches_of_a_step(plain_trainer):
    seen = []
    batches = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "logging_steps": 1}
    trainer = plain_trainer(LossDebugCallback(lambda *values: seen.append(values)), max_steps=2, **batches)
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [loss for _, _, loss in seen] == pytest.approx(logged, rel=1e-4)
    assert all(valid >= 3 for _, valid, _ in seen)


def test_loss_debug_says_once_that_it_can_not_see_a_loss_that_trainer_computes(plain_trainer, capsys):
    seen = []
    callback = LossDebugCallback(lambda *values: seen.append(values))
    plain_trainer(callback, max_steps=2, label_smoothing_factor=0.1).train()
    assert seen == []
    assert capsys.readouterr().out.count("step 1: LossDebugCallback reports nothing") == 1


def test_loss_debug_counts_once_after_a_train_that_raised(plain_trainer):
    expected, seen = [], []
    plain_trainer(LossDebugCallback(lambda *values: expected.append(values)), max_steps=2).train()
    trainer = plain_trainer(LossDebugCallback(lambda *values: seen.append(values)), max_steps=2)
    step = trainer.training_step

    def run_out_of_memory(*given):
        step(*given)
        raise torch.OutOfMemoryError

    trainer.training_step = run_out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    trainer.training_step = step
    trainer.train()
    assert seen == expected
    assert not trainer.model._forward_hooks


def test_loss_debug_takes_labels_that_are_shifted_already(plain_trainer):
    expected, seen = [], []
    plain_trainer(LossDebugCallback(lambda *values: expected.append(values)), max_steps=2).train()
    trainer = plain_trainer(LossDebugCallback(lambda *values: seen.append(values)), max_steps=2)
    collate = trainer.data_collator

    def shifted(dialogues):
        batch = collate(dialogues)
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    trainer.data_collator = shifted
    trainer.train()
    assert [valid for _, valid, _ in seen] == [valid for _, valid, _ in expected]
    assert [loss for _, _, loss in seen] == pytest.approx([loss for _, _, loss in expected], rel=1e-5)


def test_nan_monitor_names_the_first_bad_tensor_and_stops(arguments):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.multi_modal_projector.linear_1.weight[0, 0] = math.nan

    args = arguments(max_steps=5)
    monitor = NaNMonitorCallback()
    with pytest.raises(NothingLearnedError, match="after 1 rewind: every trained weight is as it was at the beginning"):
        main(args, [Poison(), monitor])
    snapshot = json.loads((Path(args.output_dir) / "nan_snapshot.json").read_text())
    assert monitor.first_bad == "model.multi_modal_projector.linear_1.weight" and snapshot["step"] == 2
    assert snapshot["tensors"][0]["nan"] == 1
    assert len(read_lines(Path(args.output_dir) / "metrics.jsonl")) == 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_monitor_sees_logits_in_a_plain_trainer(plain_trainer, smoothing):
    monitor = NaNMonitorCallback()
    trainer = guard_trainer(plain_trainer(monitor, label_smoothing_factor=smoothing))  # no NaN reaches a weight
    with torch.no_grad():
        trainer.model.model.language_model.norm.weight[0] = math.nan
    trainer.train()
    assert monitor.first_bad == "last_logits" and trainer.state.global_step == 1


def test_callbacks_configure_our_loop(arguments):
    args = arguments(freeze_projector_steps=9)
    hooks = [ProjectorFreezeHook(3), LoRAStabilizeCallback(0.5, 7, 2.5)]
    for hook in hooks:
        args = hook.configure(args)
    assert (args.freeze_projector_steps, args.early_lr_factor, args.early_lr_steps, args.lora_grad_clip) == (
        3,
        0.5,
        7,
        2.5,
    )
