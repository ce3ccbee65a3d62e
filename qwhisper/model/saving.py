"""`save_pretrained`: writes only the trained weights if all others equal their bases, otherwise the whole model.

A folder of trained weights holds projector, adapter, and the encoder if it was trained; its configuration names the
bases. A whole model is an ordinary Hugging Face folder, with unmerged LoRA in its subfolder `adapter`.
"""

import copy
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import convert_file_size_to_int

from qwhisper.checkpoint.names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    ENCODER_FILE,
    PROJECTOR_FILE,
    WHOLE_WEIGHTS,
)
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.adapter_config import is_target, read_adapter_config
from qwhisper.model.card import Origin, write_card
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.lora import is_doubtful_merge
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.offloaded import FullState, full_state
from qwhisper.model.projector import AudioProjection
from qwhisper.model.weights import (
    ENCODER,
    PROJECTOR,
    BaseRecord,
    differing,
    is_adapters,
    part,
    plain_name,
    plain_weights,
)

WHOLE_FILES = (WHOLE_WEIGHTS, f"{WHOLE_WEIGHTS}.index.json")

NO_RUN = Origin()
RESUME_FILE = "model.safetensors"  # the name is Trainer's

PUSH_KEYWORDS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")
SAVE_KEYWORDS = (
    "is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token", "save_original_format",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """Unmerged LoRA: PEFT's configuration and its tensors, by PEFT's names."""

    config: LoraConfig
    tensors: dict[str, Tensor]


def save_pretrained(
    model: Qwen3AudioForConditionalGeneration,
    base_record: BaseRecord | None,
    save_directory: str | os.PathLike,
    *,
    origin: Origin = NO_RUN,
    resumable: bool = False,
    is_main_process: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_original_format: bool = True,
    **kwargs,
) -> None:
    """Write everything needed to load the model again; raise UsageError if a weight would be lost.

    Weights that accelerate has offloaded are read from where they are: one at a time to compare them with the bases,
    and again those that are saved. A whole model is in memory while it is saved.

    base_record: of the weights that came from the model's bases; None if unknown. origin: the run, for the model card.
    state_dict: weights to save instead of the model's, as Trainer and Accelerate gather them; missing ones are taken
    from the model. is_main_process: nothing is written if False.
    resumable: `model.safetensors` holds all that is trained by the names of the state dict, from which Trainer and
    loops with Accelerate resume.
    max_shard_size, variant, save_original_format: as in transformers, for a whole model; trained weights have one file
    each.
    push_to_hub: also uploads what was written to `repo_id` (default: the folder's name), with the keywords of
    transformers' `push_to_hub`.
    """
    kwargs = {name: value for name, value in kwargs.items() if not _has_default(name, value)}
    unknown = sorted(name for name in kwargs if name not in PUSH_KEYWORDS or not push_to_hub)
    if unknown:
        raise UsageError(
            f"save_pretrained does not take {', '.join(unknown)} here: it takes {', '.join(SAVE_KEYWORDS)}, and with "
            f"push_to_hub=True {', '.join(PUSH_KEYWORDS)}"
        )
    if is_main_process is False:
        return
    folder = Path(save_directory)
    _refuse_folder(model.config, folder)
    before = model._get_files_timestamps(folder) if folder.is_dir() else {}
    if unknown := sorted((state_dict or {}).keys() - model.state_dict().keys()):
        raise UsageError(f"state_dict has {len(unknown)} weights that this model lacks, the first: {unknown[0]}")
    state = full_state(model, state_dict)
    weights, adapter = plain_weights(state), find_adapter(model, state)
    record = None if model.config.text_base is None else base_record
    changed = differing(record, weights) if record is not None else []
    if record is None or any(not name.startswith(ENCODER) or name not in record for name in changed):
        options = {"variant": variant, "save_original_format": save_original_format}
        kept = plain_weights(state, with_adapters=resumable)
        _save_whole(model, folder, kept, adapter, changed, max_shard_size=max_shard_size, **options)
    else:
        if variant is not None:
            raise UsageError(f"variant={variant!r}: trained weights are saved under fixed names; leave it out")
        _save_trained(model, folder, weights, adapter, bool(changed), max_shard_size)
        if resumable:
            parts = (PROJECTOR, ENCODER) if (folder / ENCODER_FILE).exists() else (PROJECTOR,)
            _write({key: state[key] for key in state if _is_of(key, parts)}, folder / RESUME_FILE)
    write_card(model.config, origin, folder)
    if push_to_hub:  # last, so that the weights are on the disk even without a network
        _upload(model, folder, before, token, kwargs)


def _is_of(key: str, parts: tuple[str, ...]) -> bool:
    """Whether a key of a state dict is an adapter's, or a weight below one of `parts`."""
    return is_adapters(key) or (plain_name(key) or "").startswith(parts)


def _has_default(name: str, value: Any) -> bool:
    """Keywords that other versions of transformers pass, with the value that matches the behaviour here."""
    return value is None or (name, value) in (
        ("safe_serialization", True),
        ("save_peft_format", True),
        ("distributed_checkpoint", False),
        ("create_pr", False),
    )


def _refuse_folder(config: Qwen3AudioConfig, folder: Path) -> None:
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give a folder to save to")
    for base in (config.audio_base, config.text_base):
        if base is not None and folder.exists() and Path(base["name"]).resolve() == folder.resolve():
            raise UsageError(f"{folder} holds a base of this model, whose config.json would be lost: save elsewhere")


def find_adapter(model: Qwen3AudioForConditionalGeneration, state: FullState) -> Adapter | None:
    """LoRA that is attached to the model and not merged into its weights. Raises UsageError for more than one."""
    own = [key for key in state if is_adapters(key)]
    if not own:
        return None
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    if doubtful := [path for path, layer in layers.items() if is_doubtful_merge(layer)]:
        raise UsageError(
            f"{doubtful[0]} says that it is merged, and it is offloaded, where merge() changes nothing: load the model "
            "without offloading and merge it there"
        )
    merged = {bool(layer.merged) for layer in layers.values()}
    if merged == {True}:
        warnings.warn("the adapter is merged: it is saved inside the weights only", stacklevel=2)
        return None
    if True in merged:
        raise UsageError("the adapter is merged in some layers only: merge it in all of them, or unmerge it")
    configs = getattr(model, "peft_config", None) or {}
    if len(configs) != 1:
        raise UsageError(
            f"a folder holds one adapter, and this model has {', '.join(configs) or 'one without peft_config'}: "
            "delete_adapter those that are not to be saved, or merge them"
        )
    ((name, config),) = configs.items()
    values = {**state.tensors, **{key: state[key] for key in own}}  # PEFT looks up more keys
    found = get_peft_model_state_dict(model, values, adapter_name=name, save_embedding_layers=False)
    tensors = {key: tensor for key, tensor in found.items() if is_adapters(key)}
    if len(tensors) != len(own):
        raise UsageError(f"{len(own) - len(tensors)} LoRA weights belong to no adapter of peft_config, as {own[0]}")
    return Adapter(_as_in_layers(model, name, config), tensors)


def _as_in_layers(model: nn.Module, name: str, given: LoraConfig) -> LoraConfig:
    """A copy of PEFT's configuration with the layers' own ranks and alphas.

    An adapter that is injected a second time replaces the configuration, and some of the layers.
    """
    config = copy.copy(given)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer) and name in m.scaling}
    for path, layer in layers.items():
        rank, alpha = layer.r[name], layer.lora_alpha[name]
        if not math.isclose(layer.scaling[name], alpha / (math.sqrt(rank) if config.use_rslora else rank)):
            raise UsageError(f"{path}: its adapter has another scale than peft_config gives it: merge it first")
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        found = {path: getattr(layer, field)[name] for path, layer in layers.items()}
        usual = Counter(found.values()).most_common(1)[0][0]
        setattr(config, field, usual)
        setattr(config, pattern, {path: own for path, own in found.items() if own != usual})
    return config


def _save_trained(
    model: Qwen3AudioForConditionalGeneration,
    folder: Path,
    weights: Mapping[str, Tensor],
    adapter: Adapter | None,
    encoder_changed: bool,
    max_shard_size: int | str,
) -> None:
    """Write projector, adapter and encoder (megabytes), and what is needed to find the bases."""
    config = copy.deepcopy(model.config)
    config.audio_tower_trained |= encoder_changed or model.model.encoder_is_trained
    files = {PROJECTOR_FILE: part(weights, PROJECTOR)}
    with torch.device("meta"):
        _refuse_unloadable(files[PROJECTOR_FILE], AudioProjection(config).state_dict())
    if config.audio_tower_trained:
        files[ENCODER_FILE] = part(weights, ENCODER)
    if adapter is not None:
        files[ADAPTER_FILE] = adapter.tensors
    limit = convert_file_size_to_int(max_shard_size)
    for file, tensors in files.items():
        if (size := sum(tensor.nbytes for tensor in tensors.values())) > limit:
            raise UsageError(f"max_shard_size={max_shard_size!r}: {file} is one file of {size:,} bytes; allow as many")
        refuse_without_values(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        _write(tensors, folder / file)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if adapter is not None:
        _save_adapter_config(adapter, folder, (config.text_base or {})["name"])
    _delete_others(folder, {*files, *([ADAPTER_CONFIG] if adapter is not None else [])})


def _save_whole(
    model: Qwen3AudioForConditionalGeneration,
    folder: Path,
    state: FullState,
    adapter: Adapter | None,
    changed: list[str],
    **options,
) -> None:
    """Write everything, bases included: an ordinary Hugging Face folder."""
    if getattr(model, "hf_quantizer", None) is not None:
        if model.config.text_base is None and adapter is None:
            PreTrainedModel.save_pretrained(model, folder, **options)  # loaded as a whole quantised model
            return
        saved_so = model.hf_quantizer.pre_quantized
        cure = (
            "train on its base in full"
            if saved_so
            else "load it without load_in_4bit or load_in_fp8 and train or merge there"
        )
        raise UsageError(
            f"a quantised model whose weights are not all its bases' ({_some(changed) or 'its bases are not known'}) "
            f"can't be saved: {cure}"
        )
    config = copy.deepcopy(model.config)
    config.text_base = config.audio_base = None
    config.audio_tower_trained = False
    weights = state.read()
    refuse_without_values({**weights, **(adapter.tensors if adapter is not None else {})})
    ((head, embeddings),) = model._tied_weights_keys.items()
    tied = weights[embeddings]
    if config.tie_word_embeddings and not torch.equal(weights[head].to(tied.device), tied):
        # Only one of the two was trained, replaced or resized: tying them on loading would lose it.
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    elif config.tie_word_embeddings:
        weights = {**weights, head: tied}  # one tensor, written once
    with torch.device("meta"):
        plain = {name: tensor for name, tensor in weights.items() if not is_adapters(name)}
        _refuse_unloadable(plain, type(model)(copy.deepcopy(config)).state_dict())
    with _as_whole(model, config):
        PreTrainedModel.save_pretrained(model, folder, state_dict=dict(weights), **options)
    if adapter is not None:
        (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
        _write(adapter.tensors, folder / ADAPTER_FOLDER / ADAPTER_FILE)
        _save_adapter_config(adapter, folder / ADAPTER_FOLDER, str(folder))
    kept = {ADAPTER_FOLDER} if adapter is not None else set()
    _delete_others(folder, kept | {file.name for pattern in WHOLE_FILES for file in folder.glob(pattern)})


@contextmanager
def _as_whole(model: Qwen3AudioForConditionalGeneration, config: Qwen3AudioConfig) -> Iterator[None]:
    """A context for saving all weights: with another configuration, and without transformers' mark of an adapter."""
    own = {"config": model.config, "_hf_peft_config_loaded": getattr(model, "_hf_peft_config_loaded", False)}
    model.config, model._hf_peft_config_loaded = config, False
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(model, name, value)


def _refuse_unloadable(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that a model made from the configuration has a place of the right shape for each weight."""
    odd = [name for name in {**weights, **expected} if not _fits(weights.get(name), expected.get(name))]
    if odd:
        raise UsageError(
            f"{len(odd)} weights have no place in a model of this configuration, or are missing ({_some(odd)}): they "
            "would be lost. Remove what was added to the model, or save it yourself"
        )


def refuse_without_values(weights: Mapping[str, Tensor]) -> None:
    """Raise UsageError for a weight on `meta`."""
    if empty := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise UsageError(
            f"{len(empty)} weights are on the device meta, which holds no values ({_some(empty)}): load the model "
            "again, or pass their values in state_dict"
        )


def _fits(tensor: Tensor | None, expected: Tensor | None) -> bool:
    return tensor is not None and expected is not None and tensor.shape == expected.shape


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


def _save_adapter_config(adapter: Adapter, folder: Path, base: str) -> None:
    config = copy.copy(adapter.config)
    config.modules_to_save, config.bias = None, "none"  # what they train is part of the plain weights
    layers = sorted({key.partition(".lora_")[0] for key in adapter.tensors})
    complete = is_target(config.target_modules) and all(check_target_module_exists(config, name) for name in layers)
    if not complete or config.layers_to_transform or config.exclude_modules:
        # Loading refuses any other pattern, and an adapter added again has layers of the first: list all of them.
        config.target_modules = layers
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.base_model_name_or_path = base  # if empty, every loader would ask the hub for a repository called "None"
    config.save_pretrained(folder)
    try:
        read_adapter_config(folder)
    except CheckpointError as error:
        raise UsageError(f"this adapter could not be loaded again: {error}; merge it into the model first") from None


def _delete_others(folder: Path, kept: set[str]) -> None:
    """Delete files of an earlier save: loaded together with the new weights, they would make another model."""
    names = {PROJECTOR_FILE, ENCODER_FILE, ADAPTER_FILE, ADAPTER_CONFIG, ADAPTER_FOLDER}
    names |= {file.name for pattern in WHOLE_FILES for file in folder.glob(pattern)}
    for path in (folder / name for name in names - kept):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _upload(
    model: PreTrainedModel, folder: Path, before: dict[str, float], token: str | bool | None, keywords: dict[str, Any]
) -> None:
    """Upload the files written since `before` (times by file name); create the repository if it is missing."""
    repository, private = keywords.pop("repo_id", folder.name), keywords.pop("private", None)
    repository = HfApi().create_repo(repository, private=private, token=token, exist_ok=True).repo_id
    model._upload_modified_files(folder, repository, before, token=token, **keywords)
