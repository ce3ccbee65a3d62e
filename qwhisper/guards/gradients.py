"""The trained weights by group: statistics of a step, scaling and dropping of gradients, and checksums that show
whether frozen weights changed and trained ones moved.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qwhisper.checksums import checksums
from qwhisper.guards.decide import Decision, StepStatistics

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
    """Loss and each group's gradient norm, fetched with one wait for the device. loss: scalar.

    If one of these is not finite, a second wait fetches the weights' norms, which show whether a weight is the cause.
    Otherwise no weight that takes part is broken.
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


def drop_gradients(groups: Groups) -> None:
    """Set every gradient to None, so that the optimizer changes neither the parameter nor its moments and step count.
    This detaches buffers (gradient_buffers.py).

    A gradient of zero would not suffice: AdamW would move the weight by its momentum.
    """
    for parameters in groups.values():
        for parameter in parameters:
            parameter.grad = None


def scale_gradients(decision: Decision, groups: Groups) -> None:
    """Multiply each group's gradients by its factor, in place. Called only if all norms are finite."""
    for name, factor in decision.factors.items():
        found = gradients(groups[name])
        if found:
            torch._foreach_mul_(found, factor)


def frozen_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter that does not require gradients, and of the scales of 4-bit ones.

    Leaves out buffers, because rotary embeddings may rewrite theirs, and offloaded weights, which have no bits on
    `meta`.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or parameter.is_meta:
            continue
        yield name, parameter
        if (quant_state := getattr(parameter, "quant_state", None)) is not None:
            yield f"{name}.absmax", quant_state.absmax


def group_checksums(groups: Groups) -> dict[str, int]:
    """One checksum for each group, which changes with any bit of its weights."""
    sums = checksums((f"{name}/{i}", p) for name, parameters in groups.items() for i, p in enumerate(parameters))
    return {name: sum(sums[f"{name}/{i}"] for i in range(len(parameters))) for name, parameters in groups.items()}
