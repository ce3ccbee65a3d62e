"""The field report's four callbacks, for our loop and for a plain Hugging Face `Trainer`.

In our loop they are thin: `configure` turns them into arguments, and the loop does the work. In a plain `Trainer` they
do what its events allow. Its events come after the global clip, so there a frozen projector's or an exploding LoRA's
gradient still counts in that norm; `qwhisper.train.hf_trainer.guard_trainer` puts the same effects before the clip.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwhisper.guards.apply import drop_gradients, scale_gradients
from qwhisper.guards.decide import decide
from qwhisper.guards.diagnose import describe
from qwhisper.guards.measure import step_statistics
from qwhisper.model.lora import lora_parameters
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.schedule import careful_steps


def unwrapped(model: torch.nn.Module) -> Qwen3AudioForConditionalGeneration:
    """The Qwen3Audio model inside DDP's or PEFT's wrappers."""
    inner: Any = model
    while not hasattr(inner, "multi_modal_projector") and not hasattr(
        getattr(inner, "model", None), "multi_modal_projector"
    ):
        inner = inner.module if hasattr(inner, "module") else inner.base_model.model
    return inner


class ConfiguringCallback(TrainerCallback):
    """A callback whose work our loop does by itself once `configure` has handed over the values."""

    in_our_loop = False
    values: dict[str, Any]  # of the arguments that stand for this callback

    def configure(self, args: TrainArguments) -> TrainArguments:
        """The run's arguments with this callback's values in them."""
        self.in_our_loop = True
        return dataclasses.replace(args, **self.values)


class ProjectorFreezeHook(ConfiguringCallback):
    """Keeps the projector's weights through the first `steps` optimizer steps by dropping their gradients.

    `requires_grad` stays as it is: neither graphs nor hooks nor buckets change in mid-run. steps: default as for
    `--freeze_projector_steps`: 20, at most 2 % of the run.
    """

    def __init__(self, steps: int | None = None):
        self.steps = steps
        self.values = {} if steps is None else {"freeze_projector_steps": steps}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.in_our_loop:
            return
        steps = self.steps if self.steps is not None else careful_steps("freeze_projector_steps", state.max_steps)
        if state.global_step < steps:
            projector = unwrapped(model).model.multi_modal_projector
            drop_gradients({"projector": list(projector.parameters())})


class LoRAStabilizeCallback(ConfiguringCallback):
    """LoRA's early learning-rate factor, its own clip, and no optimizer step on gradients that are not finite.

    early_lr_steps: default as for `--early_lr_steps`: 100, at most 10 % of the run.
    """

    def __init__(self, early_lr_factor: float = 0.2, early_lr_steps: int | None = None, lora_grad_clip: float = 5.0):
        self.early_lr_factor = early_lr_factor
        self.early_lr_steps = early_lr_steps
        self.lora_grad_clip = lora_grad_clip
        self.skipped_steps = 0
        self._full_rates: list[float] | None = None
        self.values = {"early_lr_factor": early_lr_factor, "lora_grad_clip": lora_grad_clip}
        if early_lr_steps is not None:
            self.values["early_lr_steps"] = early_lr_steps

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.in_our_loop:
            return
        trainable = [p for p in model.parameters() if p.requires_grad]
        lora = {id(p) for _, p in lora_parameters(model)}
        groups = {"lora": [p for p in trainable if id(p) in lora], "rest": [p for p in trainable if id(p) not in lora]}
        statistics = step_statistics(torch.zeros((), device=trainable[0].device), groups)
        decision = decide(statistics, {}, group_bounds={"lora": self.lora_grad_clip}, max_grad_norm=0.0)
        if decision.skip:
            drop_gradients(groups)
            self.skipped_steps += 1
        else:
            scale_gradients(decision, groups)
        steps = self.early_lr_steps
        if state.global_step < (careful_steps("early_lr_steps", state.max_steps) if steps is None else steps):
            self._full_rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= self.early_lr_factor

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._full_rates is not None:
            for group, rate in zip(optimizer.param_groups, self._full_rates, strict=True):
                group["lr"] = rate
            self._full_rates = None


class LossDebugCallback(TrainerCallback):
    """Prints supervised tokens and loss of every step, or hands them to `report(step, valid_labels, loss)`.

    In a plain Trainer it reads what the model kept of its last forward pass: with accumulation, the last micro-batch's.
    """

    def __init__(self, report=None):
        self.report = report or (lambda step, valid, loss: print(f"step {step}: {valid} valid labels, loss {loss:.4f}"))

    def on_step_end(self, args, state, control, model=None, step_report=None, **kwargs):
        if step_report is not None:
            self.report(state.global_step, step_report.tokens, step_report.loss)
            return
        model = unwrapped(model)
        if model.last_valid_label_count is not None and model.last_loss is not None:
            self.report(state.global_step, int(model.last_valid_label_count), float(model.last_loss))


class NaNMonitorCallback(TrainerCallback):
    """Looks at the trainable parameters and `last_logits` every `every` steps, and stops where one is not finite.

    It then writes `nan_snapshot.json` in the output folder: of every such tensor its name, shape, counts and the range
    of its finite part.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.first_bad: str | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or self.first_bad:
            return control
        model = unwrapped(model)
        tensors = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if model.last_logits is not None:
            tensors.append(("last_logits", model.last_logits))
        finite = torch.stack([torch.isfinite(tensor).all() for _, tensor in tensors]).tolist()
        bad = [tensor for tensor, is_finite in zip(tensors, finite, strict=True) if not is_finite]
        if bad:
            self.first_bad = bad[0][0]
            snapshot = {"step": state.global_step, "tensors": [describe(name, tensor) for name, tensor in bad]}
            path = Path(args.output_dir) / "nan_snapshot.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(snapshot, indent=1), encoding="utf-8")
            print(f"step {state.global_step}: {self.first_bad} is not finite; snapshot in {path}; stopping")
            control.should_training_stop = True
        return control
