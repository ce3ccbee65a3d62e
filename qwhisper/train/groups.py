"""The trainable parameters, in the groups that have their own learning rate, bound and freeze."""

import torch
from torch import nn

from qwhisper.guards.measure import Groups
from qwhisper.model.lora import lora_parameters
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.train.arguments import TrainArguments


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
