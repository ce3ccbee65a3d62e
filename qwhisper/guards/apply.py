"""Carries a decision out on the gradients."""

import torch

from qwhisper.guards.decide import Decision
from qwhisper.guards.measure import Groups, gradients


def drop_gradients(groups: Groups) -> None:
    """Sets every gradient to None, so that no optimizer touches the parameter, its moments or its step count.

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
