"""The one tensor of statistics that a step is judged by, computed where the gradients are."""

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
    return torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm([t.float() for t in tensors]))))


@torch.no_grad()
def step_statistics(loss: Tensor, groups: Groups) -> StepStatistics:
    """Loss, gradient and weight norms of each group, fetched in one wait for the device. loss: scalar."""
    values = [loss.detach().float()]
    values += [norm_of(gradients(parameters)) for parameters in groups.values()]
    values += [norm_of([p.detach() for p in parameters]) for parameters in groups.values()]
    first, *norms = torch.stack([value.to(loss.device) for value in values]).tolist()
    names = list(groups)
    return StepStatistics(
        loss=first,
        gradients=dict(zip(names, norms[: len(names)], strict=True)),
        weights=dict(zip(names, norms[len(names) :], strict=True)),
    )
