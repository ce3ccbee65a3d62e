"""Finds the source of the first value that is not finite: a weight, the batch, a module's forward or backward pass.

Runs the few samples concerned once more, with hooks, and waits for the device at every module: use it rarely.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

MASKS = ("attention_mask",)  # minus infinity is legitimate in a mask
GRADIENT = "gradient at the output"


@dataclass(frozen=True)
class Finding:
    """The first place where a number stopped being finite.

    where: name of a module, parameter or input of the batch. when: what was checked. message: why this place.
    inputs: `describe` of a module's inputs and, for "backward", of the gradients at its outputs; or of the weight or
    the input of the batch.
    """

    where: str
    when: Literal["weight", "batch", "forward", "backward"]
    message: str
    inputs: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        shown = [*self.inputs[:1], *(given for given in self.inputs[1:] if given["name"] == GRADIENT)]
        return f"{self.when}: {self.message}" + (f" ({'; '.join(map(summary, shown))})" if shown else "")

    def as_dict(self) -> dict[str, Any]:
        """The finding in JSON's types."""
        return dataclasses.asdict(self)


def describe(name: str, tensor: Tensor) -> dict[str, Any]:
    """Counts of a tensor's values, and the range of its finite part (None if it has none)."""
    tensor, dtype = _widened(tensor.detach()), tensor.dtype
    finite = tensor[torch.isfinite(tensor)]
    some = finite.numel() > 0
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "nan": int(tensor.isnan().sum()),
        "inf": int(tensor.isinf().sum()),
        "finite_min": float(finite.min()) if some else None,
        "finite_max": float(finite.max()) if some else None,
        "finite_mean_abs": float(finite.abs().mean(dtype=torch.float64)) if some else None,
    }


def _all_finite(tensor: Tensor) -> bool:
    # Detached: under gradient checkpointing, autograd must save the same tensors in the second run of a module.
    return bool(torch.isfinite(_widened(tensor.detach())).all())


def _widened(tensor: Tensor) -> Tensor:
    """fp8 in bf16, which has all of its values: torch has no isfinite for fp8."""
    return tensor.bfloat16() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def is_finite(description: dict[str, Any]) -> bool:
    return description["nan"] == description["inf"] == 0


def summary(description: dict[str, Any]) -> str:
    """One description in words."""
    text = f"{description['name']} {description['shape']} {description['dtype']}"
    if not is_finite(description):
        text += f", {description['nan']} NaN and {description['inf']} Inf"
    if description["finite_min"] is None:
        return text
    low, high, size = (description[f"finite_{key}"] for key in ("min", "max", "mean_abs"))
    return f"{text}, {low:.3g} to {high:.3g}, mean absolute {size:.3g}"


def diagnose(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    loss_of_batch: Callable[[], Tensor] | None = None,
    loss_scale: float = 1.0,
) -> Finding | None:
    """Check the weights, then the batch, then run `loss_of_batch`, by default `model(**batch).loss`, forward and
    backward. Return the first place that is not finite; None if everything is finite.

    Forward: the first module, in the order of execution, whose output is not finite although its inputs are; of nested
    ones the innermost. Backward: the first module, or parameter, whose gradient is not finite although the gradient at
    its module's output is. If a computation between modules breaks it, such as an attention kernel, the
    result names the first module with a weight matrix that this gradient reaches: q_proj for a wrong gradient of the
    query, even if a norm is in between.

    loss_scale: factor on the loss before the backward pass, for fp16. Mode and autocast stay as the caller has set
    them. Afterwards gradients are None, the hooks are gone, and random generators are as before.
    """
    finding = bad_weight(model) or _bad_input(batch)
    if finding:
        return finding
    trace = _Trace(model)
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), trace.hooks():
            loss = loss_of_batch() if loss_of_batch else model(**batch).loss
            trace.see_loss(loss)
            if trace.found is None and loss.requires_grad:
                (loss * loss_scale).backward()
    finally:
        model.zero_grad(set_to_none=True)
    return trace.finding()


def bad_weight(model: nn.Module) -> Finding | None:
    """The first weight that is not finite; None if all are."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _all_finite(parameter):
            return Finding(name, "weight", f"weight {name} is not finite", (describe("values", parameter),))
    return None


def _bad_input(batch: dict[str, Any]) -> Finding | None:
    for name, tensor in _float_tensors(batch):
        description = describe("values", tensor)
        if name not in MASKS and not is_finite(description):
            return Finding(name, "batch", f"{name} is not finite before the model runs", (description,))
    return None


def _float_tensors(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in nested tuples, lists and dictionaries, each with its dotted name."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield name, values
    elif isinstance(values, dict | list | tuple):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _float_tensors(value, f"{name}.{key}" if name else str(key))


@dataclass
class _Call:
    """One call of a module: descriptions of its inputs and of the gradients at its outputs."""

    name: str
    has_matrix: bool
    inputs: list[dict[str, Any]]
    gradients: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seen(self) -> tuple[dict[str, Any], ...]:
        return (*self.inputs, *self.gradients)


class _Trace:
    """The hooks of one forward and backward pass, and the first bad place.

    A module gets its input as a separate view: the gradient of that view comes from this module alone, while the
    tensor's gradient sums over all its readers. Tensors hold the hooks, not the reverse, so no activation lives longer.
    Under gradient checkpointing a module's second run is watched like the first.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.found: Finding | None = None
        self.running: dict[str, _Call] = {}
        self.entered: dict[str, _Call] = {}  # calls that the backward pass has reached, the latest of each module
        self.reached: _Call | None = None  # the first that such a gradient reached, with or without a matrix

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._after, name)))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(partial(self._at_parameter, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finding(self) -> Finding | None:
        if self.found is None and self.reached is not None:
            return self._arrival(self.reached)
        return self.found

    def see_loss(self, loss: Tensor) -> None:
        """Check the loss, after modules whose outputs are all finite."""
        if self.found is None and not _all_finite(loss):
            message = "the loss is not finite, although every module's output is"
            self.found = Finding("loss", "forward", message, (describe("loss", loss),))

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = {f"input {i}": value for i, value in enumerate(args)} | kwargs
        inputs = [describe(key, tensor) for key, tensor in _float_tensors(given)]
        call = _Call(name, any(p.dim() > 1 for p in module.parameters()), inputs)
        self.running[name] = call
        own = partial(_own_view, hook=partial(self._at_input, call))
        return tuple(map(own, args)), {key: own(value) for key, value in kwargs.items()}

    def _after(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        call = self.running.pop(name)
        outputs = [tensor for _, tensor in _float_tensors(output)]
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._at_output, call))
        if self.found or not all(is_finite(d) for d in call.inputs if d["name"] not in MASKS):
            return
        if not all(map(_all_finite, outputs)):
            message = f"{self._label(name)} has finite inputs and an output that is not finite"
            self.found = Finding(self._label(name), "forward", message, call.seen)

    def _at_output(self, call: _Call, gradient: Tensor) -> None:
        call.gradients.append(describe(GRADIENT, gradient))
        self.entered[call.name] = call
        if self.found is None and not is_finite(call.gradients[-1]):
            self.reached = self.reached or call
            if call.has_matrix:
                self.found = self._arrival(call)

    def _at_input(self, call: _Call, gradient: Tensor) -> None:
        if self._is_first(gradient):
            self.found = self._departure(self._label(call.name), call, "at its input")

    def _at_parameter(self, name: str, gradient: Tensor) -> None:
        if self._is_first(gradient):
            self.found = self._departure(name, self._around(name), "of this parameter")

    def _is_first(self, gradient: Tensor) -> bool:
        return self.found is None and self.reached is None and not _all_finite(gradient)

    def _departure(self, where: str, call: _Call | None, which: str) -> Finding:
        message = f"{where}: the gradient {which} is not finite, although the one at the module's output is"
        return Finding(where, "backward", message, call.seen if call else ())

    def _arrival(self, call: _Call) -> Finding:
        """The finding for a gradient that broke between the output of the surrounding module and this one's output."""
        around, where = self._around(call.name), self._label(call.name)
        source = f"the output of {around.name}" if around else "the loss"
        message = (
            f"the gradient is finite at {source} and not at the output of {where}: the computation in between breaks it"
        )
        return Finding(where, "backward", message, call.seen)

    def _around(self, name: str) -> _Call | None:
        """The innermost module around `name` that the backward pass has reached; None for the whole model."""
        around = [key for key in self.entered if name.startswith(f"{key}.")]
        return self.entered[max(around, key=len)] if around else None

    def _label(self, name: str) -> str:
        return name or type(self.model).__name__


def _own_view(value: Any, hook: Callable[[Tensor], None]) -> Any:
    if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()):
        return value
    view = value.view_as(value)
    view.register_hook(hook)
    return view
