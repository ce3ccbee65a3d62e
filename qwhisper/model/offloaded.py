"""The values of weights that accelerate has offloaded to memory or the disk.

While its layer does not compute, such a weight is a tensor on `meta`, which has a shape and no values. They are in the
map from which the layer's hook fetches them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def full_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The items of `model.state_dict()`, where an offloaded weight has its values, on the CPU.

    They are read one at a time. A weight of which nobody keeps the values stays on `meta`.
    """
    places = _places(model)
    for key, tensor in model.state_dict().items():
        if tensor.is_meta and key in places:
            values, name = places[key]
            yield key, values[name].to(tensor.dtype)  # as the hook does it: in the dtype of the parameter
        else:
            yield key, tensor


def _places(model: nn.Module) -> dict[str, tuple[Mapping[str, Tensor], str]]:
    """Key of the state dict to (map of values, key in this map), for each tensor that a hook fetches."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in _hooks(module):
            if (values := getattr(hook, "weights_map", None)) is None:
                continue
            tensors = (module.named_parameters, module.named_buffers)
            for name in (name for each in tensors for name, _ in each(recurse=hook.place_submodules)):
                found[f"{path}.{name}" if path else name] = values, name
    return found


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of one module: it has one, which may be a sequence of others."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
