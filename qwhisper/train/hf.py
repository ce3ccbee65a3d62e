"""Hugging Face integration: its callbacks in qwhisper's loop, and qwhisper's guards in a plain `Trainer`.

`Hooks` fires `transformers.TrainerCallback` events from qwhisper's loop, so that trackers and users' callbacks work
unchanged.

The field report's four callbacks work in both. In qwhisper's loop they only set arguments (`configure`), and the loop
does the work. In a plain `Trainer` they do what its events allow. `Trainer` clips before `on_pre_optimizer_step`, with
a clip that turns one NaN element into NaN everywhere; so the gradient of a frozen projector or of an exploding LoRA
still counts in that norm. `guard_trainer` replaces that clip: projector freeze, finite check, each group's fixed and
adaptive bound, then the global bound. Dropping single samples, rewinding, retrying after out-of-memory and an exact
resume need `qwhisper train`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from qwhisper.errors import UsageError
from qwhisper.guards.decide import decide
from qwhisper.guards.diagnose import describe
from qwhisper.guards.gradients import drop_gradients, scale_gradients, step_statistics
from qwhisper.guards.state import GuardState
from qwhisper.model.lora import lora_parameters
from qwhisper.model.loss import IGNORE_INDEX
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.report.terminal import say
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.optimizer import parameter_groups
from qwhisper.train.plan import Plan, careful_steps

TRACKERS_WITH_ID = ("WANDB", "SWANLAB")  # trackio continues a run of the same name without an id


def hf_arguments(args: TrainArguments, plan: Plan) -> TrainingArguments:
    """The `args` of callbacks: a TrainingArguments with the values that it shares with TrainArguments."""
    same = (
        "output_dir learning_rate per_device_train_batch_size gradient_accumulation_steps max_grad_norm "
        "num_train_epochs lr_scheduler_type warmup_steps weight_decay logging_steps save_steps save_total_limit "
        "seed"
    )
    return TrainingArguments(
        **{name: getattr(args, name) for name in same.split()},
        max_steps=plan.total_steps,
        eval_steps=plan.eval_steps,
        run_name=plan.run_name,
        report_to=args.report_to or "none",
        eval_strategy="steps" if args.eval_file else "no",
        use_cpu=not torch.cuda.is_available(),
    )


class OneBoard(TensorBoardCallback):
    """Writes one TensorBoard run, <output_dir>/tensorboard; HF's callback would begin another with each resume.

    TensorBoard hides the earlier logs of steps that a resume repeats. The environment variable TENSORBOARD_LOGGING_DIR
    sets another folder.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        folder = self.logging_dir or os.path.join(args.output_dir, "tensorboard")
        self.tb_writer = self._SummaryWriter(folder, purge_step=state.global_step + 1 if state.global_step else None)
        if not state.global_step:
            super().on_train_begin(args, state, control, **kwargs)


@contextmanager
def tracked_as(run_id: str) -> Iterator[None]:
    """A context in which trackers that identify runs by an id continue or begin the run `run_id`.

    They read it from environment variables; variables that are already set stay unchanged.
    """
    values = {f"{tracker}_RUN_ID": run_id for tracker in TRACKERS_WITH_ID}
    values |= {f"{tracker}_RESUME": "allow" for tracker in TRACKERS_WITH_ID}
    values = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)


class Tracker:
    """A tracker's callback that can't end a run: if it raises or exits, it is reported and not called again.

    Users' callbacks are not wrapped: their authors want to see the errors.
    """

    def __init__(self, callback: TrainerCallback):
        self.callback = callback
        self.is_down = False

    def __getattr__(self, event: str) -> Callable[..., TrainerControl | None]:
        handler = getattr(self.callback, event)

        def call(*shown: Any, **values: Any) -> TrainerControl | None:
            if self.is_down:
                return None
            try:
                return handler(*shown, **values)
            except (Exception, SystemExit) as error:
                self.is_down = True
                say(
                    f"--report_to: {type(self.callback).__name__} failed in {event} ({type(error).__name__}: {error}) "
                    "and is left out from now on; metrics.jsonl has everything",
                    to_stderr=True,
                )
                return None

        return call


def tracker_callbacks(report_to: list[str]) -> list[Tracker]:
    """transformers' own callbacks for tensorboard, wandb, trackio, …

    Raises UsageError with the name of one that is unknown or not installed.
    """
    try:
        found = get_reporting_integration_callbacks(report_to)
        return [Tracker((OneBoard if callback is TensorBoardCallback else callback)()) for callback in found]
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--report_to {' '.join(report_to)}: {error}; install the tracker's package or leave it out"
        ) from None


class Hooks:
    """The callbacks of one run and their arguments: `args`, `state`, `control`, model, optimizer, scheduler."""

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | Tracker],
        args: TrainingArguments,
        *,
        steps_per_epoch: int,
        **shown: Any,
    ):
        self.callbacks = callbacks
        self.args = args
        self.state = TrainerState(max_steps=args.max_steps, log_history=[])
        self.control = TrainerControl()
        self.steps_per_epoch = steps_per_epoch
        self.shown = shown  # model, processing_class, optimizer, lr_scheduler

    def fire(self, event: str, step: int, **values: Any) -> TrainerControl:
        """Call `event` of every callback and return the resulting control. step: optimizer steps done."""
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        if "logs" in values:
            self.state.log_history.append(values["logs"] | {"step": step})
        for callback in self.callbacks:
            result = getattr(callback, event)(self.args, self.state, self.control, **self.shown, **values)
            self.control = result if result is not None else self.control
        return self.control


def unwrapped(model: torch.nn.Module) -> Qwen3AudioForConditionalGeneration:
    """The Qwen3Audio model inside DDP's or PEFT's wrappers."""
    inner: Any = model
    while not hasattr(inner, "multi_modal_projector") and not hasattr(
        getattr(inner, "model", None), "multi_modal_projector"
    ):
        inner = inner.module if hasattr(inner, "module") else inner.base_model.model
    return inner


class ConfiguringCallback(TrainerCallback):
    """A callback whose work qwhisper's loop does, with the values from `configure`."""

    in_our_loop = False
    values: dict[str, Any]  # the arguments that correspond to this callback

    def configure(self, args: TrainArguments) -> TrainArguments:
        """A copy of the run's arguments with this callback's values."""
        self.in_our_loop = True
        return dataclasses.replace(args, **self.values)


class ProjectorFreezeHook(ConfiguringCallback):
    """Freezes the projector in the first `steps` optimizer steps by dropping its gradients.

    `requires_grad` is unchanged, so that graphs, hooks and buckets don't change during the run. steps: default as for
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
    """Sets LoRA's early learning-rate factor and gradient clip, and skips steps whose gradients are not finite.

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
    """Prints supervised tokens and loss of every step, or passes them to `report(step, valid_labels, loss)`.

    In a plain Trainer it reads them from the forward passes of the step, all its micro-batches together; with several
    processes, from this one's. If Trainer computes the loss itself (label_smoothing_factor, compute_loss_func), the
    model gets no labels; the callback then prints once that it reports nothing.
    """

    def __init__(self, report=None):
        self.report = report or (lambda step, valid, loss: print(f"step {step}: {valid} valid labels, loss {loss:.4f}"))
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each forward: supervised tokens, sum of losses
        self._hook: Any = None
        self._has_explained = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_train_end(args, state, control)  # a train() that raised has not called it
        self._hook = unwrapped(model).register_forward_hook(self._see, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._seen.clear()

    def on_step_end(self, args, state, control, step_report=None, **kwargs):
        if step_report is not None:
            self.report(state.global_step, step_report.tokens, step_report.loss)
        elif self._seen:
            valid, loss = (sum(map(float, values)) for values in zip(*self._seen, strict=True))
            self._seen.clear()
            self.report(state.global_step, int(valid), loss / valid if valid else math.nan)
        elif not self._has_explained:
            self._has_explained = True
            print(
                f"step {state.global_step}: LossDebugCallback reports nothing, because the model gets no labels: with "
                "label_smoothing_factor or compute_loss_func Trainer computes the loss itself; read it in Trainer's log"
            )

    def _see(self, module, args, kwargs, output) -> None:
        if module.training and kwargs.get("labels") is not None:
            shifted = kwargs.get("shift_labels")
            valid = ((kwargs["labels"][:, 1:] if shifted is None else shifted) != IGNORE_INDEX).sum()
            # Trainer gives the step's count of supervised tokens; without it the loss is the mean of this batch.
            count = kwargs.get("num_items_in_batch")
            self._seen.append((valid, output.loss.detach() * (valid if count is None else count)))


class NaNMonitorCallback(TrainerCallback):
    """Checks the trainable parameters and `last_logits` every `every` steps, and stops if one is not finite.

    It then writes `nan_snapshot.json` into the output folder: name, shape, counts and range of the finite part of every
    such tensor. If a plain Trainer computes the loss itself, `last_logits` are those of every position of the last
    micro-batch, and stay in memory until the next one.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.first_bad: str | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        unwrapped(model).keep_last_logits = True

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model = unwrapped(model)
        model.keep_last_logits, model.last_logits = False, None

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


def guard_trainer(trainer: Trainer, *, lora_grad_clip: float = 5.0, freeze_projector_steps: int = 0) -> Trainer:
    """Replace the trainer's gradient clip by qwhisper's and return the trainer.

    Needs `max_grad_norm` above 0: with 0 the trainer calls no clip at all. A step whose gradients are not finite is
    skipped: parameters, moments and step counts are unchanged (`trainer.skipped_steps` counts). The learning-rate
    schedule continues.
    """
    if trainer.args.max_grad_norm <= 0:
        raise ValueError("guard_trainer replaces Trainer's clip, which max_grad_norm=0 turns off; set it above 0")
    groups = parameter_groups(unwrapped(trainer.model))
    trainer.skipped_steps = 0
    guards = GuardState()

    def clip(parameters, max_norm, norm_type=2):
        if trainer.state.global_step < freeze_projector_steps:
            drop_gradients({"projector": groups.get("projector", [])})
        device = next(p for group in groups.values() for p in group).device
        statistics = step_statistics(torch.zeros((), device=device), groups)
        decision = decide(
            statistics,
            guards.averages,
            group_bounds={"lora": lora_grad_clip},
            max_grad_norm=min(max_norm, trainer.args.max_grad_norm),
        )
        guards.feed(statistics, decision)
        if decision.skip:
            drop_gradients(groups)
            trainer.skipped_steps += 1
        else:
            scale_gradients(decision, groups)
        return torch.tensor(decision.grad_norm)

    trainer.accelerator.clip_grad_norm_ = clip
    return trainer
