"""The trainable parameters in the groups that have their own learning rate, bound and freeze; their optimizer; the
learning rate as a function of the step alone, so that a resumed run goes on where it was.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qwhisper.errors import UsageError
from qwhisper.guards.gradients import Groups
from qwhisper.guards.state import GuardState
from qwhisper.model.lora import lora_parameters
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.train.arguments import DEFAULT_EARLY_LR_STEPS, DEFAULT_FREEZE_PROJECTOR_STEPS, TrainArguments


def parameter_groups(model: Qwen3AudioForConditionalGeneration) -> Groups:
    """ "lora", "projector" and "encoder", each only if it has trainable parameters; together they are all there are."""
    groups = {
        "lora": [p for _, p in lora_parameters(model) if p.requires_grad],
        "projector": [p for p in model.model.multi_modal_projector.parameters() if p.requires_grad],
        "encoder": [p for p in model.model.audio_tower.parameters() if p.requires_grad],
    }
    grouped = {id(p) for parameters in groups.values() for p in parameters}
    stray = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
    assert not stray, f"trainable, but in no group: {stray[:3]}"
    return {name: parameters for name, parameters in groups.items() if parameters}


def parameter_names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(groups: Groups, args: TrainArguments) -> torch.optim.AdamW:
    """AdamW with a param group a parameter group, named alike."""
    rates = {"projector": args.projector_learning_rate}
    on_cuda = all(p.is_cuda for parameters in groups.values() for p in parameters)
    return torch.optim.AdamW(
        [{"params": p, "lr": rates.get(name, args.learning_rate), "name": name} for name, p in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=on_cuda,
    )


# Steps that are there to protect a long run: (without a value, at most this percentage of all steps).
CAREFUL_STEPS = {
    "early_lr_steps": (DEFAULT_EARLY_LR_STEPS, 10),
    "freeze_projector_steps": (DEFAULT_FREEZE_PROJECTOR_STEPS, 2),
}
LONGEST_WARMUP = 10  # times the run: the learning rate then ends at a tenth


def all_steps(args: TrainArguments, num_dialogues: int) -> int:
    """Optimizer steps of the whole run."""
    steps_per_epoch = -(-num_dialogues // args.samples_per_step)
    return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)


def careful_steps(name: str, total_steps: int) -> int:
    """The default of early_lr_steps or freeze_projector_steps in a run of that length."""
    default, percent = CAREFUL_STEPS[name]
    return min(default, total_steps * percent // 100)


def settled(
    args: TrainArguments, total_steps: int, saved: Mapping[str, Any] | None = None
) -> tuple[TrainArguments, list[str]]:
    """The arguments with early_lr_steps and freeze_projector_steps as numbers, and notes about those that were capped.

    A value that was given is kept. Without one, a resumed run has the value of its first part (`saved`, the arguments
    in the checkpoint), so that its schedule stays the same with any number of epochs; a new one has the default, or a
    share of its steps where that is less. Raises UsageError for a warm-up of more than LONGEST_WARMUP times the run.
    """
    if args.warmup_steps > LONGEST_WARMUP * total_steps:
        raise UsageError(
            f"--warmup_steps {args.warmup_steps:g}: this run has {total_steps} steps, and its learning rate would end "
            f"at {total_steps / args.warmup_steps:.2g} of --learning_rate; a number below 1 is a share of all steps"
        )
    values: dict[str, Any] = {}
    notes = []
    for name, (default, percent) in CAREFUL_STEPS.items():
        if getattr(args, name) is not None:
            continue
        values[name] = (saved or {}).get(name)
        if values[name] is None:
            values[name] = careful_steps(name, total_steps)
            if values[name] < default:
                notes.append(
                    f"--{name} is {values[name]}: its default of {default}, at most {percent} % of {total_steps} steps"
                )
    return (dataclasses.replace(args, **values) if values else args), notes


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
