"""`--activation_clamp`: bounds the input of the first decoder layer's q_proj. state.py has the rule of `auto`.

The clamp acts only in training, not in evaluation or inference. So a saved model needs no clamp, and the held-out loss
is that of the model as it will be used.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qwhisper.guards.state import CLAMP_BOUND as BOUND

FIRST_Q_PROJ = re.compile(r"(^|\.)0\.(.+\.)?q_proj$")  # layers.0.self_attn.q_proj, h.0.attn.q_proj, …


def first_q_proj(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the first decoder layer's q_proj in any Hugging Face causal LM, with or without LoRA.

    None if the layer has no module of this name (GPT-2, recurrent layers): the clamp then has no effect.
    """
    get_decoder: Any = model.get_decoder
    in_decoder = {id(module): name for name, module in get_decoder().named_modules()}
    for name, module in model.named_modules():
        if FIRST_Q_PROJ.search(in_decoder.get(id(module), "")):
            return name, module
    return None


def clamped(x: Tensor, bound: Tensor) -> Tensor:
    """x limited to ±bound (a scalar), with a zero gradient where it was outside. NaN stays, for the finite check."""
    return torch.clamp(x, -bound, bound)


class ActivationClamp:
    """A pre-hook on one module that bounds its first input, if `on` and in training mode.

    The current bound is a tensor on the module's device, infinite if the clamp is off, so that a captured step need not
    be captured again when it changes. An int64 on the device counts the values changed, infinite ones included, without
    a wait. A pass that runs again (out of memory, a diagnosis) counts again. NaN is neither changed nor counted.
    """

    def __init__(self, name: str, module: nn.Module, *, bound: float = BOUND, on: bool = False):
        self.name, self.bound = name, bound
        device = next(module.parameters()).device
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._in_force = torch.zeros((), device=device)
        self.on = on
        self._handle = module.register_forward_pre_hook(self.clamp_input)

    @property
    def on(self) -> bool:
        return self._on

    @on.setter
    def on(self, on: bool) -> None:
        self._on = on
        self._in_force.fill_(self.bound if on else math.inf)

    def remove(self) -> None:
        self._handle.remove()

    def take_counts(self) -> dict[str, int]:
        """{module's name: values clamped since the last call}; waits for the device."""
        count = int(self._count)
        self._count.zero_()
        return {self.name: count}

    def count_as_now(self) -> Callable[[], None]:
        """Return a function that restores the present count, without a wait: for a step that is aborted."""
        before = self._count.clone()

        def put_back() -> None:
            self._count.copy_(before)

        return put_back

    def clamp_input(self, module: nn.Module, args: tuple) -> tuple | None:
        if not module.training:
            return None
        x = args[0]
        # In the backward pass gradient checkpointing runs the layer again: its values are already counted.
        if torch._C._current_graph_task_id() == -1:
            self._count += (x.detach().abs() > self._in_force).sum()
        return (clamped(x, self._in_force), *args[1:])
