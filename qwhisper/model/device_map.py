"""A device map, judged before anything is loaded: one place for each module with weights.

Of the entries whose name is a beginning of a weight's, the longest gives its place. A weight without an entry goes to
the CPU, as in transformers, except a tied head, which goes with the embeddings, and an encoder that is loaded alone.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from qwhisper.errors import UsageError
from qwhisper.model.bases import AUDIO_TOWER, DISK, refuse_missing_devices
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.lora import LANGUAGE_MODEL


def checked_device_map(device_map: Any, cls: type[PreTrainedModel], config: Qwen3AudioConfig) -> Any:
    """A device map that loads a whole `cls` as the given one says: a dictionary has no entry inside another one.

    Raises UsageError for a map that can't be carried out.
    """
    refuse_missing_devices(device_map)
    if not isinstance(device_map, Mapping) or device_map.keys() == {""}:
        return device_map
    return _joined(_places(device_map, cls, config))


def for_bases(
    device_map: Mapping[str, Any], cls: type[PreTrainedModel], config: Qwen3AudioConfig, encoder_device: torch.device
) -> dict[str, Any]:
    """The same for bases that are loaded one by one: a map of the causal LM by its own names, and AUDIO_TOWER with the
    encoder's device, if it has one.

    encoder_device: where the encoder goes if the map does not name it. Warns of an encoder or a projector that is to be
    on the disk.
    """
    refuse_missing_devices(device_map)
    if not {"", "model"} & device_map.keys():
        device_map = {AUDIO_TOWER: encoder_device, **device_map}
    places = _places(device_map, cls, config)
    starts = {f"{LANGUAGE_MODEL}.": f"{_causal_lm(config).base_model_prefix}.", "lm_head": "lm_head"}
    of_text = {
        there + name.removeprefix(ours): place
        for name, place in places.items()
        for ours, there in starts.items()
        if name.startswith(ours)
    }
    rest = {name: place for name, place in places.items() if not name.startswith(tuple(starts))}
    if kept := [name for name, place in rest.items() if place == DISK]:
        warnings.warn(
            f"device_map: {kept[0]} ({DISK}): encoder and projector of trained weights stay in memory", stacklevel=2
        )
    devices: dict[str, tuple[str, Any]] = {}
    for name, place in rest.items():
        if name.startswith(f"{AUDIO_TOWER}.") and place != DISK:
            devices.setdefault(str(place), (name, place))
    if len(devices) > 1:
        (first, one), (second, other) = [*devices.values()][:2]
        raise UsageError(
            f"device_map: {first} ({one}) and {second} ({other}): give the encoder of trained weights one device"
        )
    return _joined(of_text) | ({AUDIO_TOWER: next(iter(devices.values()))[1]} if devices else {})


def _places(device_map: Mapping[str, Any], cls: type[PreTrainedModel], config: Qwen3AudioConfig) -> dict[str, Any]:
    """{name: place} of the modules of a `cls` that have weights or buffers of their own.

    device_map: by names in the whole model, in the model without its head, or in the causal LM.
    """
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    weights = _weights(model)
    given = _by_our_names(device_map, model, config)
    places = {name: _place(given, name) for name in weights}
    if config.tie_word_embeddings:
        for head, embeddings in (getattr(model, "_tied_weights_keys", None) or {}).items():
            places[head] = places[embeddings] if places[head] is None else places[head]
            _refuse_split_tie(places, head, embeddings)
    found = {}
    for path, module in model.named_modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            inside: dict[Any, str] = {}
            for name in _weights(module):
                inside.setdefault(places[f"{path}.{name}"], f"{path}.{name}")
            if len(inside) > 1:  # accelerate moves them together
                (one, first), (other, second) = [*inside.items()][:2]
                raise UsageError(
                    f"device_map: {first} ({one}) and {second} ({other}) are used together: give {path} one place"
                )
            found[path] = _or_cpu(next(iter(inside)))
    return found


def _weights(module: nn.Module) -> list[str]:
    """The names of a module's parameters and buffers, tied ones included."""
    kinds = (module.named_parameters, module.named_buffers)
    return [name for each in kinds for name, _ in each(remove_duplicate=False)]


def _by_our_names(device_map: Mapping[str, Any], model: PreTrainedModel, config: Qwen3AudioConfig) -> dict[str, Any]:
    known = {*_weights(model), *(name for name, _ in model.named_modules())}
    body = LANGUAGE_MODEL if LANGUAGE_MODEL in known else LANGUAGE_MODEL.removeprefix("model.")
    prefix = _causal_lm(config).base_model_prefix
    found = {}
    for name, place in device_map.items():
        of_text = f"{body}{name.removeprefix(prefix)}" if name.startswith(f"{prefix}.") else name
        ours = next((form for form in (name, f"model.{name}", of_text) if form in known), None)
        if ours is None:
            raise UsageError(f"device_map: {name!r} is no part of this model: name its modules, such as {body}.norm")
        found[ours] = place
    return found


def _place(device_map: Mapping[str, Any], name: str) -> Any:
    """The place of a weight; None if no entry gives one."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def _or_cpu(place: Any) -> Any:
    return "cpu" if place is None else place


def _refuse_split_tie(places: Mapping[str, Any], head: str, embeddings: str) -> None:
    """Refuse a tied head in another place than the embeddings if one of them is on the disk, where accelerate would
    look for a weight that was never written.
    """
    found = [_or_cpu(places[name]) for name in (head, embeddings)]
    if DISK in found and found[0] != found[1]:
        head, embeddings = (name.removesuffix(".weight") for name in (head, embeddings))
        raise UsageError(
            f"device_map: {head} ({found[0]}) and {embeddings} ({found[1]}) are one weight in this model: give both "
            "the same place"
        )


def _joined(places: Mapping[str, Any], outer: str = "") -> dict[str, Any]:
    """The shortest map with these places and no entry inside another one. outer: what all names begin with."""
    if len(set(places.values())) == 1:
        return {outer: next(iter(places.values()))}
    depth = outer.count(".") + 1 if outer else 0
    inner: dict[str, dict[str, Any]] = {}
    for name, place in places.items():
        inner.setdefault(".".join(name.split(".")[: depth + 1]), {})[name] = place
    return {name: place for start, each in inner.items() for name, place in _joined(each, start).items()}


def _causal_lm(config: Qwen3AudioConfig) -> type[PreTrainedModel]:
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.get_text_config())]
