"""The values of weights that accelerate has offloaded to memory or the disk.

While its layer does not compute, such a weight is a tensor on `meta`, which has a shape and no values. They are in the
map from which the layer's hook fetches them.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Source:
    """Where the values of one offloaded weight are. weight: equal for tied weights, which are read from one place."""

    values: Mapping[str, Tensor]
    name: str
    dtype: torch.dtype
    weight: Hashable

    def read(self) -> Tensor:
        return self.values[self.name].to("cpu", self.dtype)


class FullState(Mapping[str, Tensor]):
    """A state dict in which each look-up of an offloaded weight reads its values, onto the CPU.

    A weight whose values are not known stays on `meta`. tensors: the same without reading.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sources: Mapping[str, Source]):
        self.tensors, self._sources = tensors, sources

    def __getitem__(self, key: str) -> Tensor:
        return self._sources[key].read() if key in self._sources else self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def has_values(self, key: str) -> bool:
        return key in self._sources or not self.tensors[key].is_meta

    def named(self, keys: Mapping[str, str]) -> "FullState":
        """The weights with these keys, by new names. keys: {new name: key}."""
        sources = {name: self._sources[key] for name, key in keys.items() if key in self._sources}
        return FullState({name: self.tensors[key] for name, key in keys.items()}, sources)

    def tied(self, keys: Iterable[str]) -> list[list[str]]:
        """The keys in groups: offloaded weights that are read from one place are in one."""
        groups: dict[Hashable, list[str]] = {}
        for key in keys:
            groups.setdefault(self._sources[key].weight if key in self._sources else key, []).append(key)
        return list(groups.values())

    def read(self) -> dict[str, Tensor]:
        """All weights at once, tied ones as one tensor."""
        found: dict[str, Tensor] = {}
        for group in self.tied(self):
            found |= dict.fromkeys(group, self[group[0]])
        return {key: found[key] for key in self}


def full_state(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> FullState:
    """A model's state dict with the values of offloaded weights. given: tensors in place of the model's."""
    given = given or {}
    state, sources = model.state_dict(), _sources(model)
    kept = {
        key: sources[key] for key, tensor in state.items() if tensor.is_meta and key in sources and key not in given
    }
    return FullState({**state, **given}, kept)


def _sources(model: nn.Module) -> dict[str, Source]:
    """{key of the state dict: source} of each tensor that a hook fetches."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in _hooks(module):
            if (values := getattr(hook, "weights_map", None)) is None:
                continue
            tensors = (module.named_parameters, module.named_buffers)
            for name, tensor in (item for each in tensors for item in each(recurse=hook.place_submodules)):
                key = f"{path}.{name}" if path else name
                found[key] = Source(values, name, tensor.dtype, _weight(values, name, tensor))
    return found


def _weight(values: Any, name: str, tensor: Tensor) -> Hashable:
    """What tied weights share: the place in a safetensors file, if accelerate reads from one, or the parameter."""
    index = getattr(getattr(values, "dataset", None), "index", {})
    info = index.get(f"{getattr(values, 'prefix', '')}{name}", {})
    if file := info.get("safetensors_file"):
        return file, info.get("weight_name", name), tensor.dtype
    return id(tensor)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of one module: it has one, which may be a sequence of others."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
