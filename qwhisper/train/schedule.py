"""The learning rate as a function of the step alone, so that a resumed run goes on where it was."""

import math

from qwhisper.guards.ladder import GuardState
from qwhisper.train.arguments import TrainArguments


def warmup_steps(args: TrainArguments, total_steps: int) -> int:
    """--warmup_steps; a number below 1 is a share of all steps."""
    return math.ceil(args.warmup_steps * total_steps) if args.warmup_steps < 1 else int(args.warmup_steps)


def learning_rate_factor(step: int, args: TrainArguments, total_steps: int) -> float:
    """What the base learning rate is multiplied by in optimizer step `step`, counted from 0.

    Warm-up, then the named schedule, times --early_lr_factor in the first --early_lr_steps.
    """
    early = args.early_lr_factor if step < args.early_lr_steps else 1.0
    warmup = warmup_steps(args, total_steps)
    if step < warmup:
        return early * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if args.lr_scheduler_type == "cosine":
        return early * 0.5 * (1.0 + math.cos(math.pi * progress))
    if args.lr_scheduler_type == "linear":
        return early * (1.0 - progress)
    return early


def guarded_factor(step: int, args: TrainArguments, total_steps: int, guards: GuardState) -> float:
    """The schedule's factor times those of the rewinds so far and, with --dynamic_lr, of the peaks lately."""
    dynamic = guards.rate.factor if args.dynamic_lr else 1.0
    return learning_rate_factor(step, args, total_steps) * guards.lr_factor * dynamic
