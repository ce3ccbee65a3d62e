"""The one tensor of statistics that a step is judged by, computed where the gradients are."""

import torch
from torch import Tensor, nn

Groups = dict[str, list[nn.Parameter]]


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def step_statistics(loss: Tensor, groups: Groups) -> dict[str, float]:
    """Loss and gradient norm of each group, fetched in one wait for the device.

    loss: scalar. A group's norm is the 2-norm over all its gradients in fp32, 0 for a group without any; NaN and Inf
    come through as they are. Returns {"loss": …, group name: norm, …}.
    """
    values = [loss.detach().float()]
    for parameters in groups.values():
        norms = torch._foreach_norm([g.float() for g in gradients(parameters)]) if gradients(parameters) else []
        values.append(torch.linalg.vector_norm(torch.stack(list(norms))) if norms else torch.zeros(()))
    device = loss.device
    numbers = torch.stack([v.to(device) for v in values]).tolist()
    return dict(zip(["loss", *groups], numbers, strict=True))
