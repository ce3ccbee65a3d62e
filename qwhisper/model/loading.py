"""From bases to one model, and from a folder of trained weights back to it.

Weights are loaded in the dtype that they compute in: no fp32 copy of the language model, no Whisper decoder ever reaches memory.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from qwhisper.data.template import listening_template
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.attention import PACKED_ATTENTION
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.lora import ADAPTER, inject
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor, add_audio_token

PROJECTOR_FILE = "projector.safetensors"
ENCODER_FILE = "encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ENCODER_KEYS = {r"^(model\.)?encoder\.": ""}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """"auto" is bf16 on an accelerator and fp32 on CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return DTYPES[dtype]


def resolve_model(name: str, hub: str, flag: str) -> str:
    """A folder or hub id that transformers can load; with `hub` "modelscope" the folder it was downloaded to."""
    if hub == "modelscope" and not Path(name).is_dir():
        try:
            from modelscope import snapshot_download
        except ImportError:
            raise UsageError("--hub modelscope needs its package: pip install modelscope") from None
        return snapshot_download(name)
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        found = "a folder without a usable config.json" if Path(name).is_dir() else f"no folder here and no model at {where}"
        raise UsageError(f"{flag} {name}: {found}. Give a folder with config.json and weights, or a hub id. ({error})") from None
    return name


def fingerprint(name: str) -> str:
    """SHA-256 over a base's configuration and the beginning, end and size of each weight file: quick, and the same in any dtype."""
    config_file = cached_file(name, "config.json")
    digest = hashlib.sha256(Path(config_file).read_bytes())
    folder = Path(config_file).parent
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 16))
            handle.seek(max(0, size - (1 << 16)))
            digest.update(handle.read())
    return digest.hexdigest()


def _refuse_missing(what: str, name: str, info: dict) -> None:
    """Weights that a checkpoint lacks are drawn at random by transformers, with a warning only."""
    if info["missing_keys"] or info.get("mismatched_keys"):
        missing = sorted([*info["missing_keys"], *map(str, info.get("mismatched_keys", []))])
        raise UsageError(f"{what} {name}: {len(missing)} weights are missing or of another shape, the first: {missing[0]}")


def load_encoder(name: str, *, dtype: torch.dtype, device: torch.device) -> TrueLengthWhisperEncoder:
    """The encoder alone, from a whole Whisper checkpoint or from one that holds only the encoder; frozen, in evaluation mode."""
    encoder, info = TrueLengthWhisperEncoder.from_pretrained(
        name,
        key_mapping=ENCODER_KEYS,
        dtype=dtype,
        attn_implementation=PACKED_ATTENTION,
        output_loading_info=True,
    )
    _refuse_missing("--audio_model", name, info)
    return encoder.to(device).requires_grad_(False).eval()


def load_language_model(name: str, *, dtype: torch.dtype, device_map, quantization_config=None, **kwargs) -> PreTrainedModel:
    """Any causal LM, frozen, with attention over packed rows; quantised by `quantization_config` while it loads."""
    language_model, info = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        attn_implementation=PACKED_ATTENTION,
        output_loading_info=True,
        **kwargs,
    )
    _refuse_missing("--text_model", name, info)
    return language_model.requires_grad_(False).eval()


def four_bit_config(dtype: torch.dtype):
    """NF4 with double quantisation for the LM's linears; its head stays out, and encoder and projector are never part of it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )


def assemble(
    config: Qwen3AudioConfig, encoder: TrueLengthWhisperEncoder, language_model: PreTrainedModel, *, projector_fp32: bool = True
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
    *,
    dtype: str | torch.dtype = "auto",
    device_map=None,
    load_in_4bit: bool = False,
    whisper_cpu: bool = False,
    hub: str = "huggingface",
    projector_fp32: bool = True,
    text_kwargs: dict | None = None,
    **config_values,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """A model with a fresh projector and its processor, from two folders or hub ids.

    device_map: None puts the LM on the first accelerator, or the CPU. config_values: fields of `Qwen3AudioConfig`.
    """
    audio_path = resolve_model(audio_model, hub, "--audio_model")
    text_path = resolve_model(text_model, hub, "--text_model")
    audio_config = AutoConfig.from_pretrained(audio_path)
    if audio_config.model_type != "whisper":
        raise UsageError(f"--audio_model {audio_model} is a {audio_config.model_type} model; it takes any Whisper checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(text_path, **(text_kwargs or {}))
    audio_token_id = add_audio_token(tokenizer)
    config_values |= {
        "audio_base": {"name": audio_path, "fingerprint": fingerprint(audio_path)},
        "text_base": {"name": text_path, "fingerprint": fingerprint(text_path)},
        "audio_token_id": audio_token_id,
    }
    model = _load_and_join(
        audio_config, audio_path, text_path, config_values, dtype, device_map, load_in_4bit, whisper_cpu, projector_fp32, text_kwargs
    )
    extractor = AutoFeatureExtractor.from_pretrained(audio_path)
    template, _ = listening_template(tokenizer)
    processor = Qwen3AudioProcessor.for_model(extractor, tokenizer, model.config, template)
    return model, processor


def _load_and_join(
    audio_config, audio_path, text_path, config_values, dtype, device_map, load_in_4bit, whisper_cpu, projector_fp32, text_kwargs
) -> Qwen3AudioForConditionalGeneration:
    device = default_device()
    dtype = resolve_dtype(dtype, device)
    quantization = four_bit_config(dtype) if load_in_4bit else None
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # the decoder's unused weights would be listed one by one
    try:
        encoder_device = torch.device("cpu") if whisper_cpu else device
        encoder = load_encoder(audio_path, dtype=dtype, device=encoder_device)
        language_model = load_language_model(
            text_path, dtype=dtype, device_map=device_map or {"": device}, quantization_config=quantization, **(text_kwargs or {})
        )
    finally:
        hf_logging.set_verbosity(verbosity)
    config = Qwen3AudioConfig(audio_config=encoder.config, text_config=language_model.config, **config_values)
    return assemble(config, encoder, language_model, projector_fp32=projector_fp32)


def _trained_state(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """File name to {parameter name: tensor}: projector always, encoder where it is trained, adapter where there is one."""
    projector = model.model.multi_modal_projector.state_dict()
    state = {PROJECTOR_FILE: projector}
    if model.model.encoder_is_trained:
        state[ENCODER_FILE] = model.model.audio_tower.state_dict()
    if getattr(model, "peft_config", None):
        state[ADAPTER_FILE] = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    return {file: {k: v.detach().cpu().contiguous() for k, v in tensors.items()} for file, tensors in state.items()}


def save_trained(model: Qwen3AudioForConditionalGeneration, folder: str | os.PathLike) -> None:
    """Writes the trained weights and what is needed to find their bases; megabytes, not gigabytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in _trained_state(model).items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if getattr(model, "peft_config", None):
        peft_config: LoraConfig = model.peft_config[ADAPTER]
        # Left empty, every loader would ask the hub for a repository called "None".
        peft_config.base_model_name_or_path = model.config.text_base["name"]
        peft_config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def is_trained_folder(name: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds trained weights whose bases live elsewhere."""
    if Path(name).is_dir():
        return (Path(name) / PROJECTOR_FILE).is_file()
    found = cached_file(str(name), PROJECTOR_FILE, _raise_exceptions_for_missing_entries=False,
                        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False)  # fmt: skip
    return found is not None


def read_trained_config(name: str | os.PathLike) -> Qwen3AudioConfig:
    config = Qwen3AudioConfig.from_pretrained(name)
    if config.text_base is None or config.audio_base is None:
        raise CheckpointError(f"{name}/config.json names no bases (audio_base, text_base): it was not written by qwhisper")
    return config


def load_trained(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    device_map=None,
    load_in_4bit: bool = False,
    whisper_cpu: bool = False,
    projector_fp32: bool = True,
    audio_model: str | None = None,
    text_model: str | None = None,
    text_kwargs: dict | None = None,
) -> Qwen3AudioForConditionalGeneration:
    """The bases that the folder names, then its projector and adapter. LoRA and projector come back trainable.

    audio_model, text_model: where the bases lie now, if they have moved; their fingerprints must agree.
    """
    config = read_trained_config(name)
    paths = {}
    for role, moved_to in (("audio", audio_model), ("text", text_model)):
        base = getattr(config, f"{role}_base")
        paths[role] = resolve_model(moved_to or base["name"], "huggingface", f"--{role}_model")
        if fingerprint(paths[role]) != base["fingerprint"]:
            raise CheckpointError(f"{name} was trained on another {role} base than {paths[role]}: point --{role}_model to the one it was trained on")  # fmt: skip  # noqa: E501
    values = {k: getattr(config, k) for k in ("audio_token_id", "projector_stack", "projector_hidden_act", "projector_scale",
              "projector_init_scale", "audio_lead_silence", "audio_tail_silence", "audio_base", "text_base")}  # fmt: skip
    model = _load_and_join(
        config.audio_config, paths["audio"], paths["text"], values, dtype, device_map, load_in_4bit, whisper_cpu, projector_fp32, text_kwargs
    )
    load_trained_weights(model, name)
    return model


def load_trained_weights(model: Qwen3AudioForConditionalGeneration, name: str | os.PathLike) -> None:
    """Puts a folder's projector, adapter and encoder into a model of the same bases, adding LoRA if the folder has it."""
    files = {file: _find(name, file) for file in (PROJECTOR_FILE, ENCODER_FILE, ADAPTER_FILE)}
    try:
        if files[ADAPTER_FILE]:
            if not getattr(model, "peft_config", None):
                inject(model, LoraConfig.from_pretrained(str(Path(files[ADAPTER_FILE]).parent)))
                for parameter in model.model.language_model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.float()
            result = set_peft_model_state_dict(model, load_file(files[ADAPTER_FILE]), adapter_name=ADAPTER)
            if result.unexpected_keys:
                raise ValueError(f"unknown LoRA weight {result.unexpected_keys[0]}")
        model.model.multi_modal_projector.load_state_dict(load_file(files[PROJECTOR_FILE]))
        if files[ENCODER_FILE]:
            model.model.audio_tower.load_state_dict(load_file(files[ENCODER_FILE]))
    except (RuntimeError, ValueError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{name}: its weights do not fit this model ({error})") from error


def _find(name: str | os.PathLike, file: str) -> str | None:
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.is_file() else None
    return cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
