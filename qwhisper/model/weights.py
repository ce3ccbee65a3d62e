"""Which weights of a model still equal their bases: judged by content, never by `requires_grad`.

PEFT merges through `.data`, a callback may write to a frozen weight, a module may be replaced: no flag or version
counter shows all of these. So the model keeps the checksum of every weight from a base, and saving compares them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwhisper.checksums import changed, checksums
from qwhisper.model.offloaded import FullState, full_state

PROJECTOR = "model.multi_modal_projector."
ENCODER = "model.audio_tower."
NARROW = (torch.bfloat16, torch.float16)

BaseRecord = dict[str, tuple[int, ...]]  # plain name to (checksum, *shape); without the checksum for one on `meta`


def is_adapters(key: str) -> bool:
    """Whether a key of a state dict is a tensor of LoRA."""
    return ".lora_" in key


def plain_name(key: str) -> str | None:
    """A weight's name without the parts that PEFT and torch.compile add.

    None for a weight that PEFT's `modules_to_save` has replaced with a trained copy: the copy gets the name.
    """
    if ".original_module." in key:
        return None
    key = key.replace("_orig_mod.", "").replace(".base_layer.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)


def plain_weights(state: FullState, *, with_adapters: bool = False) -> FullState:
    """The weights by their plain names. with_adapters: also LoRA's tensors, by their keys."""
    named = ((key if is_adapters(key) else plain_name(key), key) for key in state)
    return state.named({name: key for name, key in named if name and (with_adapters or not is_adapters(key))})


def placed(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the keys that its weights have in `model`, where an adapter may have been put around them."""
    own = list(model.state_dict())
    places = {name: key for name, key in ((plain_name(key), key) for key in own) if name is not None and name != key}
    return {places.get(key, key): tensor for key, tensor in state.items()}


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below `prefix`, with names relative to it."""
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def record_of(model: nn.Module) -> BaseRecord:
    """The record of a model's weights as they are now."""
    return base_record(plain_weights(full_state(model)))


def base_record(weights: FullState) -> BaseRecord:
    """Checksum and shape of every plain weight outside the projector. Offloaded weights are read one at a time, tied
    ones once.
    """
    groups = weights.tied(name for name in weights if not name.startswith(PROJECTOR))
    first = {name: group[0] for group in groups for name in group}
    sums = checksums((group[0], weights[group[0]]) for group in groups if weights.has_values(group[0]))
    shapes = {name: (*tensor.shape,) for name, tensor in weights.tensors.items() if name in first}
    return {name: (sums[first[name]], *shape) if first[name] in sums else shape for name, shape in shapes.items()}


def differing(record: BaseRecord, weights: FullState) -> list[str]:
    """Plain names, outside the projector, whose content or shape differs from the record, or that only one side has.

    A weight cast to a wider dtype, as by PEFT's `prepare_model_for_kbit_training`, counts as equal.
    """
    found = changed(record, base_record(weights))
    return [name for name in found if name not in weights or not _is_widened(weights[name], record.get(name))]


def _is_widened(tensor: Tensor, before: tuple[int, ...] | None) -> bool:
    if before is None or tensor.is_meta or not tensor.is_floating_point() or before[1:] != (*tensor.shape,):
        return False
    for dtype in NARROW:
        narrow = tensor.to(dtype)
        if tensor.element_size() > narrow.element_size() and checksums([("it", narrow)])["it"] == before[0]:
            return torch.equal(narrow.to(tensor.dtype), tensor)
    return False


@contextmanager
def following_casts(model: PreTrainedModel) -> Iterator[None]:
    """A context for moving or casting the whole model: weights that equal their bases before still count as equal
    afterwards, in the new dtype.

    model: one with a `base_record`.
    """
    record = model.base_record
    if record is None:
        yield
        return
    kept = set(differing(record, plain_weights(full_state(model))))
    yield
    now = record_of(model)
    model.base_record = {name: before if name in kept else now[name] for name, before in record.items()}
