"""Build one model from its bases, or from a folder of trained weights. The caller passes the model's class."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from qwhisper.checkpoint.facts import run_arguments
from qwhisper.checkpoint.names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    ARGUMENTS_FILE,
    ENCODER_FILE,
    MODEL_CONFIG,
    PROJECTOR_FILE,
)
from qwhisper.errors import CheckpointError, UsageError, first_line
from qwhisper.memory import naming_memory_limit
from qwhisper.model.adapter_config import read_adapter_config
from qwhisper.model.base_kinds import refuse_unpackable
from qwhisper.model.bases import (
    DEFAULT_OPTIONS,
    WEIGHT_FILES,
    LoadOptions,
    adopt_4bit_linears,
    find_file,
    fingerprint,
    load_encoder,
    load_language_model,
    refuse_missing,
    resolve_model,
)
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.device_map import checked_device_map
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.find_base import find_base
from qwhisper.model.fp8 import choose_products
from qwhisper.model.load_keywords import (
    current_names,
    hub_keywords,
    quantised_text_alone,
    trained_options,
)
from qwhisper.model.lora import ADAPTER, inject
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.trained_folder import check_files, read_config, read_weights, reading
from qwhisper.model.weights import ENCODER, PROJECTOR, is_adapters, part, plain_name, record_of

# Flags for the format of the language model's linears.
FORMATS = {"load_in_4bit": "4 bits", "load_in_fp8": "fp8"}

Model = TypeVar("Model", bound=Qwen3AudioForConditionalGeneration)


def join(
    cls: type[Model],
    config: Qwen3AudioConfig,
    encoder: TrueLengthWhisperEncoder,
    language_model: PreTrainedModel,
    *,
    projector_fp32: bool = True,
) -> Model:
    """One model from loaded parts and a new projector; nothing is copied."""
    with torch.device("meta"):
        model = cls(config)
    body = language_model.base_model
    head = language_model.get_output_embeddings()
    model.model.audio_tower = encoder
    model.model.language_model = body
    model.lm_head = head
    projector = model.model.multi_modal_projector
    place = body.get_input_embeddings().weight.device
    projector.to_empty(device=encoder.device if place.type == "meta" else place)  # meta: the embeddings are offloaded
    projector.to(torch.float32 if projector_fp32 else language_model.dtype)
    for module in projector.modules():
        if module is not projector:
            model._init_weights(module)
    for name in ("hf_device_map", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(language_model, name):
            setattr(model, name, getattr(language_model, name))
    model.generation_config = language_model.generation_config
    return model.eval()


def load_and_join(
    cls: type[Model], config: Qwen3AudioConfig, audio_path: str, text_path: str, options: LoadOptions
) -> Model:
    """One model from both bases, with a record of their weights and a new projector."""
    cures = "--load_in_fp8, --load_in_4bit, --whisper_cpu or a smaller --text_model"
    with naming_memory_limit(f"while {audio_path} and {text_path} were loaded", cures):
        encoder = load_encoder(
            audio_path, dtype=options.compute_dtype, device=options.encoder_device, access=options.access
        )
        language_model = load_language_model(text_path, options)
        refuse_unpackable(text_path, language_model)
    config.audio_config, config.text_config = encoder.config, language_model.config
    model = join(cls, config, encoder, language_model, projector_fp32=options.projector_fp32)
    choose_products(model)
    model.base_record = record_of(model)
    return model


def is_trained_folder(name: str | os.PathLike) -> bool:
    """Whether a folder holds trained weights whose bases live elsewhere."""
    return os.path.isdir(name) and find_file(name, PROJECTOR_FILE) is not None


def downloaded(name: str | os.PathLike, keywords: Mapping[str, Any]) -> Path | None:
    """The local copy of a hub repository of trained weights; None if the repository holds none.

    keywords: those of `from_pretrained`; its revision, token and the like hold here.
    """
    access = hub_keywords(keywords)
    try:
        found = find_file(name, PROJECTOR_FILE, **access)
    except OSError:  # no such repository, or no network: the loader's message is clearer
        return None
    if found is not None:
        for file in (MODEL_CONFIG, GENERATION_CONFIG_NAME, ARGUMENTS_FILE, ADAPTER_CONFIG, ADAPTER_FILE, ENCODER_FILE):
            find_file(name, file, **access)
    return None if found is None else found.parent


def load_trained(
    cls: type[Model],
    name: str | os.PathLike,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> Model:
    """The bases that the folder names, then its projector and adapter. LoRA and projector are trainable.

    audio_model, text_model: present places of the bases, if `find_base` can't find them; their fingerprints must agree.
    Raises UsageError, CheckpointError for another base, before anything is loaded. A whole model is loaded from its
    folder alone; again only LoRA and projector are trainable.
    """
    if is_whole_folder(name):
        if audio_model or text_model:
            warnings.warn(f"{name} holds a whole model: no other bases are loaded into it", stacklevel=2)
        return _load_whole(cls, name, options)
    config = read_config(name)
    audio_path = same_base(name, "audio", config, audio_model, options.access)
    text_path = same_base(name, "text", config, text_model, options.access)
    assert config.audio_base is not None and config.text_base is not None
    config.audio_base["name"], config.text_base["name"] = audio_path, text_path  # the next save names these
    model = load_and_join(cls, config, audio_path, text_path, options)
    load_trained_weights(model, name)
    if find_file(name, GENERATION_CONFIG_NAME) is not None:
        try:
            model.generation_config = GenerationConfig.from_pretrained(name)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{name}: {GENERATION_CONFIG_NAME} can't be read ({first_line(error)})") from error
    return model


def options_as_trained(name: str | os.PathLike, given: Mapping[str, Any]) -> LoadOptions:
    """Load options. given: fields of LoadOptions; those that are None or missing are taken from the run that trained
    the folder: a base that was trained on in 4 bits or fp8 is loaded so.
    """
    given = {key: value for key, value in given.items() if value is not None}
    return LoadOptions(**_as_trained(name, given) | given)


def _as_trained(name: str | os.PathLike, given: Mapping[str, Any]) -> dict[str, bool]:
    """The values of the folder's run. given: values that are given instead; one format of the weights replaces the
    other.
    """
    run = run_arguments(Path(name)) if os.path.isdir(name) else {}
    quantised = any(given.get(key) for key in (*FORMATS, "quantization_config"))
    names = ("projector_fp32",) if quantised else ("projector_fp32", *FORMATS)
    return {key: run[key] for key in names if key in run}


def is_whole_folder(name: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds a qwhisper model including its bases' weights."""
    check_files(name)
    ours = Qwen3AudioConfig.get_config_dict(name)[0].get("model_type") == Qwen3AudioConfig.model_type
    return ours and find_file(name, PROJECTOR_FILE) is None and any(find_file(name, file) for file in WEIGHT_FILES)


def is_without_head(name: str | os.PathLike) -> bool:
    """Whether a folder holds a model that was saved without its head."""
    return Qwen3AudioConfig.get_config_dict(name)[0].get("architectures") == ["Qwen3AudioModel"]


def _load_whole(cls: type[Model], name: str | os.PathLike, options: LoadOptions) -> Model:
    for key, words in FORMATS.items():
        if getattr(options, key):
            raise UsageError(f"{name} holds a whole model, which is not loaded in {words}: leave {key} out")
    with naming_memory_limit(f"while {name} was loaded", "--whisper_cpu"):
        keywords = {"dtype": options.compute_dtype, "device_map": options.device_map or {"": options.device}}
        with reading(name, "it can't be loaded"):
            model = load_whole(cls, name, **keywords)
    model.model.audio_tower.to(options.encoder_device)
    projector = model.model.multi_modal_projector
    projector.to(torch.float32 if options.projector_fp32 else options.compute_dtype)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapters(key) or key.startswith(PROJECTOR))
    return model.eval()


def load_whole(cls: type[Model], name, *args, output_loading_info=False, **kwargs):
    """transformers' `from_pretrained` for a whole model, and the adapter beside it. Hashes are not checked."""
    check_files(name)
    if "quantization_config" in kwargs:
        kwargs["quantization_config"] = quantised_text_alone(kwargs["quantization_config"])
    if kwargs.get("device_map") is not None:
        config = Qwen3AudioConfig.from_pretrained(name, **hub_keywords(kwargs))
        kwargs["device_map"] = checked_device_map(kwargs["device_map"], cls, config)
    model, info = super(Qwen3AudioForConditionalGeneration, cls).from_pretrained(  # type: ignore[misc]
        name, *args, output_loading_info=True, **kwargs
    )
    if not output_loading_info:  # who asks for it reads there what is missing
        refuse_incomplete(name, info, kwargs)
    adopt_4bit_linears(model)
    load_adapter_of_whole(model, name)
    return (model, info) if output_loading_info else model


def refuse_incomplete(name: str | os.PathLike, info: dict, keywords: Mapping[str, Any]) -> None:
    """`refuse_missing` for a whole model, except that with ignore_mismatched_sizes a user has asked for random weights
    in the place of those of another shape.
    """
    accepted = {"mismatched_keys": ()} if keywords.get("ignore_mismatched_sizes") else {}
    refuse_missing("the model", str(name), info | accepted)


def load_for_user(cls: type[Model], name: str | os.PathLike, **kwargs) -> Model | tuple[Model, dict]:
    """`load_trained` with the keywords that `from_pretrained` and the Auto classes pass on; see `load_keywords`.

    config: only the folder's own config, as the Auto classes pass it. attn_implementation: as in transformers; the Auto
    classes pass it within the config. output_loading_info: also returns transformers' report, which is empty, as a
    weight that is missing, left over or of another shape is an error. Any keyword without effect is refused.
    """
    kwargs = current_names(kwargs)
    config = kwargs.pop("config", None)
    _refuse_other_config(name, config)
    attention = kwargs.pop("attn_implementation", None) or _attention_in(config)
    _refuse_code(name, kwargs.pop("trust_remote_code", False))
    moved = {role: kwargs.pop(role) for role in ("audio_model", "text_model") if role in kwargs}
    with_info = kwargs.pop("output_loading_info", False)
    options = trained_options(name, kwargs, _as_trained(name, kwargs), cls, read_config(name))
    model = load_trained(cls, name, options, **moved)
    model.name_or_path = model.config.name_or_path = os.fspath(name)  # where trainers look for the processor
    if attention:
        model.set_attn_implementation(attention)
    report: dict[str, set] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    return (model, report | {"error_msgs": set()}) if with_info else model


def _attention_in(config: Qwen3AudioConfig | str | os.PathLike | None) -> dict[str, str]:
    """{part: attention implementation} as a given configuration names it; "" stands for the whole model."""
    if not isinstance(config, Qwen3AudioConfig):
        return {}
    parts = {"": config, "audio_config": config.audio_config, "text_config": config.text_config}
    return {name: part._attn_implementation for name, part in parts.items() if part._attn_implementation}


def refuse_for_whole(name: str | os.PathLike, keywords: dict) -> None:
    """Refuse keywords of folders of trained weights, which transformers would ignore for a whole model."""
    _refuse_code(name, keywords.get("trust_remote_code", False))
    bases = {"audio_model", "text_model", *FORMATS, "whisper_cpu", "projector_fp32"}
    if given := sorted(bases & keywords.keys()):
        hint = "; give quantization_config=BitsAndBytesConfig(load_in_4bit=True)" if "load_in_4bit" in given else ""
        raise UsageError(f"{name} is no folder of trained weights alone: {', '.join(given)} has no effect on it{hint}")


def _refuse_code(name: str | os.PathLike, trusted: bool) -> None:
    if trusted:
        raise UsageError(
            f"{name}: trust_remote_code=True has no effect: no code of a checkpoint is ever run; leave it out"
        )


def _refuse_other_config(name: str | os.PathLike, given: Qwen3AudioConfig | str | os.PathLike | None) -> None:
    if given is None:
        return
    own = Qwen3AudioConfig.from_pretrained(name).to_dict()
    other = (given if isinstance(given, Qwen3AudioConfig) else Qwen3AudioConfig.from_pretrained(given)).to_dict()
    said_elsewhere = {"dtype", "architectures", "transformers_version"}
    names = [key for key in {**own, **other} if key not in said_elsewhere and not key.startswith("_")]
    if differing := sorted(key for key in names if own.get(key) != other.get(key)):
        raise UsageError(
            f"{name}: the given config differs in {', '.join(differing)}, but trained weights are loaded with their "
            "own config: leave it out, and change the config of the loaded model"
        )


def same_base(
    name: str | os.PathLike, role: str, config: Qwen3AudioConfig, moved_to: str | None, access: Mapping[str, Any]
) -> str:
    """Path of the audio or text base of a folder of trained weights; it must be the one used in training."""
    base = getattr(config, f"{role}_base")
    if not moved_to:
        return find_base(name, role, base, access)
    path = resolve_model(moved_to, "huggingface", f"--{role}_model", access)
    if fingerprint(path, access) != base["fingerprint"]:
        raise UsageError(
            f"--{role}_model {path}: {name} was trained on {base['name']}, which is another model; "
            "leave the flag out, or start a new run"
        )
    return path


def load_trained_weights(model: Qwen3AudioForConditionalGeneration, name: str | os.PathLike) -> None:
    """Load a folder's projector, adapter and encoder into a model of the same bases; add LoRA if the folder has it."""
    adapter, projector, encoder = (find_file(name, file) for file in (ADAPTER_FILE, PROJECTOR_FILE, ENCODER_FILE))
    if is_whole_folder(name):
        _fill(model.model.audio_tower, _encoder_of_whole(name))
        return
    if projector is None:
        raise CheckpointError(f"{name} has no {PROJECTOR_FILE}: it was not written by qwhisper, or is incomplete")
    try:
        if adapter is not None:
            _load_adapter(model, name, adapter)
        _fill(model.model.multi_modal_projector, read_weights(projector))
        if encoder is not None:
            _fill(model.model.audio_tower, read_weights(encoder))
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{name}: its weights do not fit this model ({error})") from error


def _encoder_of_whole(name: str | os.PathLike) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(name).glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(ENCODER)}  # noqa: SIM118
    return part(tensors, ENCODER)


def load_adapter_of_whole(model: Qwen3AudioForConditionalGeneration, name: str | os.PathLike) -> None:
    """Load the LoRA that was saved beside a whole model, if there is one."""
    adapter = find_file(name, f"{ADAPTER_FOLDER}/{ADAPTER_FILE}")
    if adapter is not None:
        try:
            _load_adapter(model, name, adapter, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}")
        except (RuntimeError, ValueError, OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: its adapter does not fit its weights ({error})") from error


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Load plain weights into a module to which LoRA may have been added."""
    named = ((plain_name(key), key) for key in module.state_dict() if not is_adapters(key))
    places = {name: key for name, key in named if name is not None}
    if places.keys() != tensors.keys():
        raise ValueError(
            f"weights in the file or in the model alone: {', '.join(sorted(places.keys() ^ tensors.keys()))}"
        )
    module.load_state_dict({places[name]: tensor for name, tensor in tensors.items()}, strict=False)


def _refuse_other_ranks(config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Check the ranks before matrices of these sizes are made: a large one would fill the memory."""
    said = {config.r, *(config.rank_pattern or {}).values()}
    saved = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name and tensor.ndim == 2}
    if not saved or max(said) > max(saved) or not saved <= said:
        raise ValueError(f"the adapter's configuration has the ranks {sorted(said)}, its weights {sorted(saved)}")


def _load_adapter(
    model: Qwen3AudioForConditionalGeneration,
    name: str | os.PathLike,
    file: Path,
    config_file: str = ADAPTER_CONFIG,
) -> None:
    tensors = read_weights(file)
    if not getattr(model, "peft_config", None):
        found = find_file(name, config_file)
        if found is None:
            raise ValueError(f"{config_file} is missing")
        config = read_adapter_config(found.parent)
        _refuse_other_ranks(config, tensors)
        if model.config.text_base is not None:  # its present place; PEFT warns of a missing folder
            config.base_model_name_or_path = model.config.text_base["name"]
        inject(model, config)
        dtype = next(iter(tensors.values())).dtype
        for key, parameter in model.named_parameters():
            if is_adapters(key):
                parameter.data = parameter.data.to(dtype)
    own = get_peft_model_state_dict(model, model.state_dict(), adapter_name=ADAPTER, save_embedding_layers=False)
    expected = {key for key in own if is_adapters(key)}
    if expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())
        raise ValueError(f"{len(odd)} LoRA weights are in the file or in the model alone, the first: {odd[0]}")
    set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
