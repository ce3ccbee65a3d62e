"""The one tensor of statistics that a step is judged by, computed where the gradients are."""

import dataclasses

import torch
from torch import Tensor, nn

from qwhisper.guards.decide import StepStatistics

Groups = dict[str, list[nn.Parameter]]


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def norm_of(tensors: list[Tensor]) -> Tensor:
    """2-norm over all elements, fp32 scalar."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm([t.float() for t in tensors])
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


@torch.no_grad()
def step_statistics(loss: Tensor, groups: Groups) -> StepStatistics:
    """Loss and each group's gradient norm, fetched in one wait for the device. loss: scalar.

    The weights' norms are fetched, in a second wait, only where one of these is not finite: a broken weight that takes
    part makes them so, and all that is left to find out is whether it was one.
    """
    values = {name: norm_of(gradients(parameters)) for name, parameters in groups.items()}
    first, *norms = _fetch([loss.detach().float(), *values.values()], loss.device)
    statistics = StepStatistics(loss=first, gradients=dict(zip(values, norms, strict=True)))
    if not statistics.not_finite:
        return statistics
    weights = _fetch([norm_of([p.detach() for p in parameters]) for parameters in groups.values()], loss.device)
    return dataclasses.replace(statistics, weights=dict(zip(groups, weights, strict=True)))


def _fetch(scalars: list[Tensor], device: torch.device) -> list[float]:
    return torch.stack([scalar.to(device) for scalar in scalars]).tolist() if scalars else []
