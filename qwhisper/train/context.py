"""What one training run holds, and what one of its steps did."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qwhisper.data.rows import Sample
from qwhisper.engine.executor import Executor
from qwhisper.guards.clamp import ActivationClamp
from qwhisper.guards.gradients import Groups
from qwhisper.guards.snapshot import Snapshots
from qwhisper.report.events import RunLog
from qwhisper.report.terminal import StepLines
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.hf import Hooks
from qwhisper.train.probe import ListeningProbe
from qwhisper.train.state import TrainState


@dataclass
class Session:
    """Everything that one training run holds; `save` writes a checkpoint of it and returns its folder."""

    args: TrainArguments
    total_steps: int
    num_dialogues: int
    groups: Groups
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    executor: Executor
    snapshots: Snapshots
    clamp: ActivationClamp | None  # None: off, or an LM without a q_proj
    state: TrainState
    log: RunLog
    lines: StepLines
    hooks: Hooks
    eval_samples: list[Sample]
    probe: ListeningProbe | None  # None: no dialogue with audio to probe with
    base_checksums: dict[str, int]  # of the weights that must not change
    save: Callable[["Session"], Path]

    def fire(self, event: str, **values) -> None:
        self.hooks.fire(event, self.state.step, **values)

    @property
    def frozen_groups(self) -> frozenset[str]:
        """Groups whose gradient is dropped in the step that comes next, or is being taken."""
        return frozenset({"projector"} if self.state.step < self.args.freeze_projector_steps else ())

    def set_learning_rates(self) -> None:
        """Those of the next step, after a resume or where a guard has changed its factor."""
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self.scheduler.lr_lambdas[0](self.state.step)
        self.scheduler.last_epoch = self.state.step


@dataclass
class StepReport:
    """What a step did.

    loss: nats a supervised token. tokens, num_samples, has_audio: of the samples that it was taken on. grad_norm,
    group_norms: before clipping. peaks: groups above their adaptive bound, with norm / average. skipped: why, or None.
    frozen: groups whose gradient was dropped. divergence: from the teacher, nats a taught token; None without one,
    and where samples were dropped.
    """

    loss: float
    tokens: int
    grad_norm: float
    skipped: str | None
    group_norms: dict[str, float]
    peaks: dict[str, float]
    num_samples: int
    has_audio: bool
    frozen: frozenset[str]
    divergence: float | None = None
    seconds: float = 0.0
