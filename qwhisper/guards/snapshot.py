"""Copies of the trainable weights and the optimizer's moments in host memory: what a run rewinds to."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qwhisper.guards.gradients import Groups

KEPT = 2  # the newest may already be damaged although it is finite
WEIGHT = "weight"  # no optimizer has a moment of this name
TRIED = "tried"  # key of the saved step that was restored last


@dataclass
class Copy:
    """For each parameter, its moments by name and its value as WEIGHT."""

    step: int
    tensors: list[dict[str, Tensor]]


class Snapshots:
    """Snapshots of one run's parameters and optimizer, the newest last.

    Copies from a GPU go to pinned memory without a wait: later work follows in the same stream. The memory of a
    discarded copy is used again, because pinning takes longer than copying.
    """

    def __init__(self, groups: Groups, optimizer: torch.optim.Optimizer):
        self.parameters = [p for parameters in groups.values() for p in parameters]
        self.optimizer = optimizer
        self.kept: deque[Copy] = deque()
        self.restored: int | None = None

    def sound(self) -> bool:
        """Whether every present weight and moment is finite."""
        return all_finite([tensor for entry in self._now() for tensor in entry.values()])

    @torch.no_grad()
    def take(self, step: int) -> bool:
        """Copy all weights and moments, unless one is not finite. Returns whether they were copied.

        A second copy of the same step replaces the first. May run out of memory.
        """
        if not self.sound():
            return False
        tensors = self._now()
        spare: list[dict[str, Tensor]] = [{} for _ in tensors]
        if self.kept and self.kept[-1].step == step:
            spare = self.kept.pop().tensors
        elif len(self.kept) == KEPT:
            spare = self.kept.popleft().tensors
        self.kept.append(Copy(step, [on_host(*pair) for pair in zip(tensors, spare, strict=True)]))
        self.restored = None
        return True

    def _now(self) -> list[dict[str, Tensor]]:
        return [{WEIGHT: p.detach()} | self.optimizer.state.get(p, {}) for p in self.parameters]

    def as_tensors(self) -> dict[str, Tensor]:
        """All copies, by "step|parameter's index|name", for a file. Wait for the device before."""
        tensors = {
            f"{copy.step}|{index}|{name}": tensor
            for copy in self.kept
            for index, entry in enumerate(copy.tensors)
            for name, tensor in entry.items()
            if name == WEIGHT or was_stepped(entry)
        }
        return tensors | {TRIED: torch.tensor(-1 if self.restored is None else self.restored)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the copies by those that `as_tensors` gave."""
        tried = int(tensors.pop(TRIED))
        copies: dict[int, list[dict[str, Tensor]]] = {}
        for key, tensor in tensors.items():
            step, index, name = key.split("|", 2)
            copies.setdefault(int(step), [{} for _ in self.parameters])[int(index)][name] = tensor
        self.kept = deque(Copy(step, copies[step]) for step in sorted(copies))
        self.restored = None if tried < 0 else tried

    @torch.no_grad()
    def restore(self) -> int | None:
        """Restore the newest copy, or the older one if the newest has just been tried. Writes in place, so that weights
        and moments keep their memory.

        Returns the step of the copy; None if there is no copy.
        """
        if self.restored is not None and len(self.kept) > 1:
            self.kept.pop()
        if not self.kept:
            return None
        copy = self.kept[-1]
        for parameter, saved in zip(self.parameters, copy.tensors, strict=True):
            parameter.copy_(saved[WEIGHT])
            state, moments = self.optimizer.state[parameter], saved.keys() - {WEIGHT}
            for key in state.keys() - moments:
                state[key].zero_()  # as it was before the parameter's first step
            for key in moments:
                state[key].copy_(saved[key])
        self.restored = copy.step
        return copy.step


def was_stepped(moments: Mapping[str, Tensor]) -> bool:
    """Whether the optimizer has stepped this parameter. A rewind to before its first step leaves moments of zeros."""
    return "step" in moments and bool(moments["step"] != 0)


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all values are finite, with one wait for the device."""
    largest = torch._foreach_norm(tensors, float("inf"))  # NaN if any value is NaN
    device = tensors[0].device
    return bool(torch.stack([value.to(device, torch.float32) for value in largest]).isfinite().all())


def on_host(tensors: dict[str, Tensor], spare: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, in the memory of `spare` for names that it has."""
    copies = {}
    for name, tensor in tensors.items():
        into = spare.get(name)
        if into is None:
            into = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = into.copy_(tensor, non_blocking=True)
    return copies
