"""The memory of the trained weights' gradients: one flat tensor a group, made once and written in place.

A parameter's `.grad` is a view into the flat tensor. The view is attached when the step's first gradient arrives at the
parameter, so None keeps its meaning for the optimizer: it steps no parameter that the step's samples don't reach.
Setting `.grad` to None detaches the view (a frozen group, a skipped step, a callback) and keeps the memory.

Autograd adds into an existing `.grad` in place. It replaces it only under `create_graph=True`, which training does not
use. 0 + gradient has the bits of the gradient, except that -0 becomes 0.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from qwhisper.guards.gradients import Groups, drop_gradients

ALIGNMENT = 512  # bytes, as in CUDA's allocator: the order in which kernels sum an array depends on its alignment


class GradientBuffers:
    """The gradients of all groups. flat: the tensors that hold them, one for each group, dtype and device.

    A view is attached only while it is zero. A backward pass before the first `start`, or after the step's gradients
    were dropped, makes new tensors, as without buffers. The hooks hold no reference to the buffers.
    """

    def __init__(self, groups: Groups):
        self.groups = groups
        self.flat: list[Tensor] = []
        self._views: dict[nn.Parameter, Tensor] = {}
        self._zero: dict[nn.Parameter, Tensor] = {}  # the views that no gradient of this step has reached yet
        for parameters in groups.values():
            for kind in dict.fromkeys((p.dtype, p.device) for p in parameters):
                self._allocate([p for p in parameters if (p.dtype, p.device) == kind])
        for parameter in self._views:
            parameter.register_hook(partial(attach_view, weakref.ref(self), parameter))

    def _allocate(self, parameters: list[nn.Parameter]) -> None:
        """Make one flat tensor with a view for each parameter, laid out as autograd lays out its gradient."""
        step = ALIGNMENT // parameters[0].element_size()
        offsets, end = [], 0
        for parameter in parameters:
            offsets.append(end)
            end += -(-parameter.numel() // step) * step
        flat = torch.zeros(end, dtype=parameters[0].dtype, device=parameters[0].device)
        self.flat.append(flat)
        for parameter, offset in zip(parameters, offsets, strict=True):
            strides = torch.empty_like(parameter, device="meta").stride()
            self._views[parameter] = flat.as_strided(parameter.shape, strides, offset)

    def start(self) -> None:
        """Detach every gradient and zero the buffers: before the packs of a step, and before they are run again."""
        drop_gradients(self.groups)
        for flat in self.flat:
            flat.zero_()  # not a product with 0, which would keep values that are not finite
        self._zero = dict(self._views)

    def attach(self, parameter: nn.Parameter) -> None:
        """Make the parameter's view its `.grad`, unless it has one or its view has been attached in this step."""
        if parameter.grad is None:
            parameter.grad = self._zero.pop(parameter, None)

    @contextmanager
    def recording(self) -> Iterator[list[nn.Parameter]]:
        """While a backward pass is recorded, not run: it is to add into the views. Yields a list that receives the
        parameters that it reaches. Afterwards every `.grad` is as before.
        """
        before = {parameter: parameter.grad for parameter in self._views}
        reached: list[nn.Parameter] = []
        handles = [p.register_post_accumulate_grad_hook(reached.append) for p in self._views]
        for parameter, view in self._views.items():
            parameter.grad = view
        try:
            yield reached
        finally:
            for handle in handles:
                handle.remove()
            for parameter, gradient in before.items():
                parameter.grad = gradient


def attach_view(buffers: "weakref.ref[GradientBuffers]", parameter: nn.Parameter, gradient: Tensor) -> None:
    """Hook that runs before autograd adds a gradient to `.grad`."""
    if (alive := buffers()) is not None:
        alive.attach(parameter)
