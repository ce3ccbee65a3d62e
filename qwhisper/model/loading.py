"""From bases to one model, and from a folder of trained weights back to it."""

import os
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from qwhisper.data.template import listening_template
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.adapter_config import read_adapter_config
from qwhisper.model.bases import (
    LoadOptions,
    find_file,
    fingerprint,
    load_encoder,
    load_language_model,
    naming_memory_limit,
    resolve_model,
)
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.lora import ADAPTER, inject, lora_parameters
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.pretrained import load_config, load_feature_extractor, load_tokenizer
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor, add_audio_token
from qwhisper.model.trained_folder import read_config, read_weights

DEFAULT_OPTIONS = LoadOptions()
PROJECTOR_FILE = "projector.safetensors"
ENCODER_FILE = "encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"


def assemble(
    config: Qwen3AudioConfig,
    encoder: TrueLengthWhisperEncoder,
    language_model: PreTrainedModel,
    *,
    projector_fp32: bool = True,
) -> Qwen3AudioForConditionalGeneration:
    """One model of loaded parts and a fresh projector; nothing is copied."""
    with torch.device("meta"):
        model = Qwen3AudioForConditionalGeneration(config)
    body = language_model.base_model
    head = language_model.get_output_embeddings()
    model.model.audio_tower = encoder
    model.model.language_model = body
    model.lm_head = head
    projector = model.model.multi_modal_projector
    projector.to_empty(device=body.get_input_embeddings().weight.device)
    projector.to(torch.float32 if projector_fp32 else language_model.dtype)
    for module in projector.modules():
        if module is not projector:
            model._init_weights(module)
    for name in ("hf_device_map", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        if hasattr(language_model, name):
            setattr(model, name, getattr(language_model, name))
    model.generation_config = language_model.generation_config
    return model.eval()


def build_from_bases(
    audio_model: str,
    text_model: str,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    hub: str = "huggingface",
    **config_values,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """A model with a fresh projector and its processor, from two folders or hub ids.

    config_values: fields of `Qwen3AudioConfig`, such as audio_lead_silence.
    """
    audio_path = resolve_model(audio_model, hub, "--audio_model")
    text_path = resolve_model(text_model, hub, "--text_model")
    audio_config = load_config(audio_path)
    if audio_config.model_type != "whisper":
        raise UsageError(
            f"--audio_model {audio_model} is a {audio_config.model_type} model; it takes any Whisper checkpoint"
        )
    tokenizer = load_tokenizer(text_path)
    config = Qwen3AudioConfig(
        audio_config=audio_config,
        text_config=load_config(text_path),
        audio_base={"name": audio_path, "fingerprint": fingerprint(audio_path)},
        text_base={"name": text_path, "fingerprint": fingerprint(text_path)},
        audio_token_id=add_audio_token(tokenizer),
        **config_values,
    )
    model = _load_and_join(config, audio_path, text_path, options)
    extractor = load_feature_extractor(audio_path)
    template, _ = listening_template(tokenizer)
    processor = Qwen3AudioProcessor.for_model(extractor, tokenizer, model.config, template)
    return model, processor


def _load_and_join(
    config: Qwen3AudioConfig, audio_path: str, text_path: str, options: LoadOptions
) -> Qwen3AudioForConditionalGeneration:
    cures = "--load_in_4bit, --whisper_cpu or a smaller --text_model"
    with naming_memory_limit(f"{audio_path} and {text_path} were", cures):
        encoder = load_encoder(audio_path, dtype=options.compute_dtype, device=options.encoder_device)
        language_model = load_language_model(text_path, options)
    config.audio_config, config.text_config = encoder.config, language_model.config
    return assemble(config, encoder, language_model, projector_fp32=options.projector_fp32)


def _trained_state(model: Qwen3AudioForConditionalGeneration) -> dict[str, dict[str, torch.Tensor]]:
    """File name to {parameter name: tensor}: projector, encoder where it was trained, adapter where there is one."""
    state = {PROJECTOR_FILE: model.model.multi_modal_projector.state_dict()}
    if model.config.audio_tower_trained:
        state[ENCODER_FILE] = model.model.audio_tower.state_dict()
    if getattr(model, "peft_config", None):
        state[ADAPTER_FILE] = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {file: {k: v.detach().cpu().contiguous() for k, v in tensors.items()} for file, tensors in state.items()}


def save_trained(model: Qwen3AudioForConditionalGeneration, folder: str | os.PathLike) -> None:
    """Writes the trained weights and what is needed to find their bases; megabytes, not gigabytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.audio_tower_trained |= model.model.encoder_is_trained
    for file, tensors in _trained_state(model).items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if getattr(model, "peft_config", None):
        peft_config: LoraConfig = model.peft_config[ADAPTER]
        assert model.config.text_base is not None
        # Left empty, every loader would ask the hub for a repository called "None".
        peft_config.base_model_name_or_path = model.config.text_base["name"]
        peft_config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def is_trained_folder(name: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds trained weights whose bases live elsewhere."""
    try:
        return find_file(name, PROJECTOR_FILE) is not None
    except OSError:  # no such repository, or no network: whoever loads it from there says so better
        return False


def load_trained(
    name: str | os.PathLike,
    options: LoadOptions = DEFAULT_OPTIONS,
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> Qwen3AudioForConditionalGeneration:
    """The bases that the folder names, then its projector and adapter. LoRA and projector come back trainable.

    audio_model, text_model: where the bases lie now, if they have moved; their fingerprints must agree. Raises
    UsageError, CheckpointError for another base, before anything is loaded.
    """
    config = read_config(name)
    audio_path = _same_base(name, "audio", config, audio_model)
    text_path = _same_base(name, "text", config, text_model)
    model = _load_and_join(config, audio_path, text_path, options)
    load_trained_weights(model, name)
    return model


def load_for_user(name: str | os.PathLike, **kwargs) -> Qwen3AudioForConditionalGeneration:
    """`load_trained` with the keywords that `from_pretrained` and the Auto classes pass on."""
    for passed_along in ("config", "adapter_kwargs", "trust_remote_code"):
        kwargs.pop(passed_along, None)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    moved = {role: kwargs.pop(role) for role in ("audio_model", "text_model") if role in kwargs}
    unknown = kwargs.keys() - {field.name for field in fields(LoadOptions)}
    if unknown:
        known = ", ".join([field.name for field in fields(LoadOptions)] + ["audio_model", "text_model"])
        raise UsageError(
            f"{name} holds trained weights alone; loading it takes {known}, not {', '.join(sorted(unknown))}"
        )
    return load_trained(name, LoadOptions(**kwargs), **moved)


def _same_base(name: str | os.PathLike, role: str, config: Qwen3AudioConfig, moved_to: str | None) -> str:
    """Where the audio or text base of a folder of trained weights is; it must be the one that they were trained on."""
    base = getattr(config, f"{role}_base")
    path = resolve_model(moved_to or base["name"], "huggingface", f"--{role}_model")
    if fingerprint(path) == base["fingerprint"]:
        return path
    if moved_to:
        raise UsageError(
            f"--{role}_model {path}: {name} was trained on {base['name']}, which is another model; "
            "leave the flag out, or start a new run"
        )
    raise CheckpointError(
        f"{name} was trained on another {role} base than {path} is now: point --{role}_model to the one that it was"
    )


def load_trained_weights(model: Qwen3AudioForConditionalGeneration, name: str | os.PathLike) -> None:
    """Puts a folder's projector, adapter and encoder into a model of the same bases, adding LoRA if it is there."""
    adapter, projector, encoder = (find_file(name, file) for file in (ADAPTER_FILE, PROJECTOR_FILE, ENCODER_FILE))
    if projector is None:
        raise CheckpointError(f"{name} has no {PROJECTOR_FILE}: it was not written by qwhisper, or not wholly")
    try:
        if adapter is not None:
            _load_adapter(model, adapter)
        model.model.multi_modal_projector.load_state_dict(read_weights(projector))
        if encoder is not None:
            model.model.audio_tower.load_state_dict(read_weights(encoder))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name}: its weights do not fit this model ({error})") from error


def _refuse_other_ranks(config: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Before matrices of the ranks that the configuration gives are made: a large one would fill the memory."""
    said = {config.r, *(config.rank_pattern or {}).values()}
    saved = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name and tensor.ndim == 2}
    if not saved or max(said) > max(saved) or not saved <= said:
        raise ValueError(f"the adapter's configuration has the ranks {sorted(said)}, its weights {sorted(saved)}")


def _load_adapter(model: Qwen3AudioForConditionalGeneration, file: Path) -> None:
    tensors = read_weights(file)
    peft_config = read_adapter_config(file.parent)
    _refuse_other_ranks(peft_config, tensors)
    if not getattr(model, "peft_config", None):
        inject(model, peft_config)
        dtype = next(iter(tensors.values())).dtype
        for _, parameter in lora_parameters(model):
            parameter.data = parameter.data.to(dtype)
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER).keys()
    if expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())
        raise ValueError(f"{len(odd)} LoRA weights are in the file or in the model alone, the first: {odd[0]}")
    set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
