"""The groups of trainable parameters, their optimizer and their learning rate.

Each group can have its own learning rate, gradient bound and frozen steps. The schedule depends on the step alone,
so a resumed run continues it.
"""

import math

import torch
from torch import nn

from qwhisper.guards.gradients import Groups
from qwhisper.guards.state import GuardState
from qwhisper.model.lora import lora_parameters
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.plan import Plan


def parameter_groups(model: Qwen3AudioForConditionalGeneration) -> Groups:
    """ "lora", "projector" and "encoder", each only if it has trainable parameters; every such parameter is in one."""
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


def make_optimizer(groups: Groups, args: TrainArguments, plan: Plan) -> torch.optim.AdamW:
    """AdamW with one param group for each group, under the same name."""
    rates = {"projector": plan.projector_learning_rate}
    on_cuda = all(p.is_cuda for parameters in groups.values() for p in parameters)
    return torch.optim.AdamW(
        [{"params": p, "lr": rates.get(name, args.learning_rate), "name": name} for name, p in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=on_cuda,
    )


def learning_rate_factor(step: int, args: TrainArguments, plan: Plan) -> float:
    """Factor on the base learning rate in optimizer step `step`, counted from 0.

    Warm-up, then the named schedule, times --early_lr_factor in the first --early_lr_steps.
    """
    early = args.early_lr_factor if step < plan.early_lr_steps else 1.0
    warmup = plan.num_warmup_steps
    if step < warmup:
        return early * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, plan.total_steps - warmup))
    if args.lr_scheduler_type == "cosine":
        return early * 0.5 * (1.0 + math.cos(math.pi * progress))
    if args.lr_scheduler_type == "linear":
        return early * (1.0 - progress)
    return early


def guarded_factor(step: int, args: TrainArguments, plan: Plan, guards: GuardState) -> float:
    """The schedule's factor, times those of the rewinds so far and of --dynamic_lr."""
    dynamic = guards.rate.factor if args.dynamic_lr else 1.0
    return learning_rate_factor(step, args, plan) * guards.lr_factor * dynamic
