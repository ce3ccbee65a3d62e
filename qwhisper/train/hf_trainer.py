"""For those who stay with Hugging Face's `Trainer`: what its events come too late for.

`Trainer` clips before it fires `on_pre_optimizer_step`, with a clip that turns one NaN element into NaN everywhere.
`guard_trainer` puts our ladder in that clip's place: projector freeze, finite check, each group's fixed and adaptive
bound, then the global bound. Dropping single samples, rewinding, retrying after out-of-memory and an exact resume need
our own loop (`qwhisper train`).
"""

import torch
from transformers import Trainer

from qwhisper.guards.apply import drop_gradients, scale_gradients
from qwhisper.guards.decide import decide
from qwhisper.guards.ladder import GuardState
from qwhisper.guards.measure import step_statistics
from qwhisper.train.callbacks import unwrapped
from qwhisper.train.groups import parameter_groups


def guard_trainer(trainer: Trainer, *, lora_grad_clip: float = 5.0, freeze_projector_steps: int = 0) -> Trainer:
    """Replaces the trainer's gradient clip by ours and returns the trainer.

    Needs `max_grad_norm` above 0: with 0 the trainer calls no clip at all. A step whose gradients are not finite is
    skipped: parameters, moments and step counts stay as they are (`trainer.skipped_steps` counts). The learning-rate
    schedule goes on.
    """
    if trainer.args.max_grad_norm <= 0:
        raise ValueError(
            "guard_trainer works in place of Trainer's clip, which max_grad_norm=0 turns off; set it above 0"
        )
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
