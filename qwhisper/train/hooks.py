"""Fires `transformers.TrainerCallback` events from our loop, so that trackers and users' callbacks work unchanged."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from qwhisper.errors import UsageError
from qwhisper.train.arguments import TrainArguments

TRACKERS_WITH_ID = ("WANDB", "SWANLAB")  # trackio goes on with the run of the same name by itself


def hf_arguments(args: TrainArguments, total_steps: int) -> TrainingArguments:
    """What callbacks see as `args`: a real TrainingArguments with the values of ours that it has."""
    same = (
        "output_dir learning_rate per_device_train_batch_size gradient_accumulation_steps max_grad_norm "
        "num_train_epochs lr_scheduler_type warmup_steps weight_decay logging_steps save_steps save_total_limit "
        "eval_steps seed run_name"
    )
    return TrainingArguments(
        **{name: getattr(args, name) for name in same.split()},
        max_steps=total_steps,
        report_to=args.report_to or "none",
        eval_strategy="steps" if args.eval_file else "no",
        use_cpu=not torch.cuda.is_available(),
    )


class OneBoard(TensorBoardCallback):
    """All of a run in one TensorBoard run, <output_dir>/tensorboard: HF's begins another, named by the time, with each
    resume.

    What was logged of steps that are taken again, since a checkpoint was of before them, is no longer shown. The
    environment variable TENSORBOARD_LOGGING_DIR names another folder.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        folder = self.logging_dir or os.path.join(args.output_dir, "tensorboard")
        self.tb_writer = self._SummaryWriter(folder, purge_step=state.global_step + 1 if state.global_step else None)
        if not state.global_step:
            super().on_train_begin(args, state, control, **kwargs)


@contextmanager
def tracked_as(run_id: str) -> Iterator[None]:
    """While it lasts, trackers that know a run by its id go on with the one of that id, or begin it.

    They read it from their environment variables, of which those that are set stay as they are.
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
    """A tracker's callback that no run dies of: once it raises or exits, it is named and called no more.

    A user's own callback is not wrapped: what it raises is a fault that its author wants to see.
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
                print(
                    f"--report_to: {type(self.callback).__name__} failed in {event} ({type(error).__name__}: {error}) "
                    "and is left out from now on; metrics.jsonl has everything",
                    file=sys.stderr,
                )
                return None

        return call


def tracker_callbacks(report_to: list[str]) -> list[Tracker]:
    """transformers' own callbacks for tensorboard, wandb, trackio, …

    Raises UsageError naming one that is unknown or not installed.
    """
    try:
        found = get_reporting_integration_callbacks(report_to)
        return [Tracker((OneBoard if callback is TensorBoardCallback else callback)()) for callback in found]
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--report_to {' '.join(report_to)}: {error}; install the tracker's package or leave it out"
        ) from None


class Hooks:
    """The callbacks of one run and what they are shown: `args`, `state`, `control`, model, optimizer, scheduler."""

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
        """Calls `event` of every callback. step: optimizer steps done. Returns the control that they left."""
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        if "logs" in values:
            self.state.log_history.append(values["logs"] | {"step": step})
        for callback in self.callbacks:
            result = getattr(callback, event)(self.args, self.state, self.control, **self.shown, **values)
            self.control = result if result is not None else self.control
        return self.control
