"""The trained weights by group: the statistics that a step is judged by, a decision carried out on the gradients, and
checksums that show whether frozen weights changed and trained ones moved.
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


def drop_gradients(groups: Groups) -> None:
    """Sets every gradient to None, so that no optimizer touches the parameter, its moments or its step count. Buffers
    (gradient_buffers.py) are detached by it.

    A zeroed gradient would not do: AdamW moves on its momentum.
    """
    for parameters in groups.values():
        for parameter in parameters:
            parameter.grad = None


def scale_gradients(decision: Decision, groups: Groups) -> None:
    """Multiplies each group's gradients by its factor, in place. Only finite norms lead here."""
    for name, factor in decision.factors.items():
        found = gradients(groups[name])
        if found:
            torch._foreach_mul_(found, factor)


def frozen_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter that does not require gradients, and of the scales of 4-bit ones.

    Left out: buffers, since rotary embeddings may rewrite theirs as they go; weights that are offloaded (on `meta` they
    have no bits); 4-bit weights on a CPU, which bitsandbytes lays out anew at their first evaluation.
    """
    for name, parameter in model.named_parameters():
        quant_state = getattr(parameter, "quant_state", None)
        if parameter.requires_grad or parameter.is_meta or (quant_state is not None and parameter.device.type == "cpu"):
            continue
        yield name, parameter
        if quant_state is not None:
            yield f"{name}.absmax", quant_state.absmax


def group_checksums(groups: Groups) -> dict[str, int]:
    """One checksum a group: another number as soon as any bit of its weights has changed."""
    sums = checksums((f"{name}/{i}", p) for name, parameters in groups.items() for i, p in enumerate(parameters))
    return {name: sum(sums[f"{name}/{i}"] for i in range(len(parameters))) for name, parameters in groups.items()}
