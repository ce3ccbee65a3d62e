"""Copies of the trainable weights and the optimizer's moments in host memory: what a run rewinds to."""

from collections import deque

import torch

from qwhisper.guards.measure import Groups

KEPT = 2  # the newest may already be poisoned without showing it


class Snapshots:
    """Of one run's parameters and optimizer, the newest last."""

    def __init__(self, groups: Groups, optimizer: torch.optim.Optimizer):
        self.parameters = [p for parameters in groups.values() for p in parameters]
        self.optimizer = optimizer
        self.kept: deque[tuple[int, list[torch.Tensor], list[dict]]] = deque(maxlen=KEPT)
        self.restored: int | None = None

    @torch.no_grad()
    def take(self, step: int) -> bool:
        """Copies everything, unless a number in it is not finite. Returns whether it did."""
        weights = [p.detach().to("cpu", copy=True) for p in self.parameters]
        moments = [
            {key: value.detach().to("cpu", copy=True) for key, value in self.optimizer.state.get(p, {}).items()}
            for p in self.parameters
        ]
        tensors = weights + [value for entry in moments for value in entry.values()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return False
        self.kept.append((step, weights, moments))
        self.restored = None
        return True

    @torch.no_grad()
    def restore(self) -> int | None:
        """Puts the newest copy back, or the older one where the newest has just been tried.

        Returns the step that it is of; None where there is none.
        """
        if self.restored is not None and len(self.kept) > 1:
            self.kept.pop()
        if not self.kept:
            return None
        step, weights, moments = self.kept[-1]
        for parameter, weight, saved in zip(self.parameters, weights, moments, strict=True):
            parameter.copy_(weight)
            state = self.optimizer.state[parameter]
            for key in [key for key in state if key not in saved]:
                del state[key]
            for key, value in saved.items():
                state[key] = value.to(state[key].device, copy=True)
        self.restored = step
        return step
