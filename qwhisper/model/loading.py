"""From bases to one model, and from a folder of trained weights back to it.

Weights are loaded in the dtype that they compute in: no fp32 copy of the language model, no Whisper decoder ever
reaches memory.
"""

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from qwhisper.data.template import listening_template
from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.attention import PACKED_ATTENTION, attention_for
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.lora import ADAPTER, inject, lora_parameters
from qwhisper.model.loss import head_logits
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor, add_audio_token

PROJECTOR_FILE = "projector.safetensors"
ENCODER_FILE = "encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ENCODER_KEYS = {r"^(model\.)?encoder\.": ""}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is laid into memory, wherever its weights come from.

    dtype: of the language model and the encoder: "bf16", "fp16", "fp32", a torch dtype or its name; "auto": see
    `compute_dtype`.
    device_map: as in transformers, for the language model; None: all of it on the first accelerator, or the CPU.
    load_in_4bit: NF4 for the language model's linears. whisper_cpu: the encoder stays on the CPU.
    projector_fp32: the projector in fp32 instead of `dtype`.
    """

    dtype: str | torch.dtype = "auto"
    device_map: str | dict | None = None
    load_in_4bit: bool = False
    whisper_cpu: bool = False
    projector_fp32: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def encoder_device(self) -> torch.device:
        return torch.device("cpu") if self.whisper_cpu else self.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """ "auto" is bf16 on an accelerator and fp32 on CPU."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        if self.dtype == "auto":
            return torch.float32 if self.device.type == "cpu" else torch.bfloat16
        dtype = DTYPES.get(self.dtype, getattr(torch, self.dtype, None))
        if not isinstance(dtype, torch.dtype):
            raise UsageError(f"dtype {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        return dtype


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
        found = (
            "a folder without a usable config.json" if Path(name).is_dir() else f"no folder here or model at {where}"
        )
        raise UsageError(
            f"{flag} {name}: {found}. Give a folder with config.json and weights, or a hub id. ({error})"
        ) from None
    return name


def _find(name: str | os.PathLike, file: str) -> Path | None:
    """A file of a folder or a hub repository, downloaded if need be; None where it has no such file."""
    found = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _weight_files(name: str) -> list[Path]:
    """The files that transformers loads from here, shards in the order of their names."""
    found = next((path for path in (_find(name, file) for file in WEIGHT_FILES) if path is not None), None)
    if found is None:
        raise UsageError(f"{name} has no weights: none of {', '.join(WEIGHT_FILES)} is there")
    if found.suffix != ".json":
        return [found]
    shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(cached_file(name, shard)) for shard in shards]


def fingerprint(name: str) -> str:
    """SHA-256 over a base's configuration and the beginning, end and size of each of its weight files: quick."""
    digest = hashlib.sha256(Path(cached_file(name, "config.json")).read_bytes())
    for file in _weight_files(name):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 16))
            handle.seek(max(0, size - (1 << 16)))
            digest.update(handle.read())
    return digest.hexdigest()


def refuse_missing(what: str, name: str, info: dict) -> None:
    """Weights that a checkpoint lacks are drawn at random by transformers, with a warning only."""
    missing = sorted([*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])])
    if missing:
        raise UsageError(
            f"{what} {name}: {len(missing)} weights are missing or of another shape, the first: {missing[0]}"
        )


def load_encoder(name: str, *, dtype: torch.dtype, device: torch.device) -> TrueLengthWhisperEncoder:
    """The encoder alone, frozen and in evaluation mode, from a whole Whisper checkpoint or from one of the encoder."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # the decoder's unused weights would be listed one by one
    try:
        encoder, info = TrueLengthWhisperEncoder.from_pretrained(
            name,
            key_mapping=ENCODER_KEYS,
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            output_loading_info=True,
        )
    finally:
        hf_logging.set_verbosity(verbosity)
    refuse_missing("--audio_model", name, info)
    return encoder.to(device).requires_grad_(False).eval()


def load_language_model(name: str, options: LoadOptions) -> PreTrainedModel:
    """Any causal LM, frozen, with attention over packed rows; quantised while it loads if that is wanted."""
    language_model, info = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=options.compute_dtype,
        device_map=options.device_map or {"": options.device},
        quantization_config=four_bit_config(options.compute_dtype) if options.load_in_4bit else None,
        attn_implementation=attention_for(AutoConfig.from_pretrained(name)),
        output_loading_info=True,
    )
    refuse_missing("--text_model", name, info)
    for module in language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks 4-bit weights for this CPU in the first pass in evaluation mode (and fails where a
            # size is no multiple of 32); from then on no gradient passes through them any more, in training mode
            # either.
            module.support_avx512bf16_for_cpu = False
    _refuse_other_head(name, language_model)
    return language_model.requires_grad_(False).eval()


@torch.no_grad()
def _refuse_other_head(name: str, language_model: PreTrainedModel) -> None:
    """Some families scale their logits; the loss, which applies the head by itself, would be silently wrong."""
    language_model.eval()
    ids = torch.arange(4, device=language_model.get_input_embeddings().weight.device)[None]
    hidden_states = language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    softcap = getattr(language_model.config, "final_logit_softcapping", None)
    ours = head_logits(hidden_states, language_model.get_output_embeddings(), softcap)
    theirs = language_model(input_ids=ids, use_cache=False).logits.float()
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise UsageError(
            f"--text_model {name}: its logits are more than lm_head(hidden_states), which is not supported"
        )


def four_bit_config(dtype: torch.dtype):
    """NF4 with double quantisation for the LM's linears, without its head; encoder and projector stay as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],  # replaces the defaults
    )


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
    options: LoadOptions = LoadOptions(),
    *,
    hub: str = "huggingface",
    **config_values,
) -> tuple[Qwen3AudioForConditionalGeneration, Qwen3AudioProcessor]:
    """A model with a fresh projector and its processor, from two folders or hub ids.

    config_values: fields of `Qwen3AudioConfig`, such as audio_lead_silence.
    """
    audio_path = resolve_model(audio_model, hub, "--audio_model")
    text_path = resolve_model(text_model, hub, "--text_model")
    audio_config = AutoConfig.from_pretrained(audio_path)
    if audio_config.model_type != "whisper":
        raise UsageError(
            f"--audio_model {audio_model} is a {audio_config.model_type} model; it takes any Whisper checkpoint"
        )
    tokenizer = AutoTokenizer.from_pretrained(text_path)
    config = Qwen3AudioConfig(
        audio_config=audio_config,
        text_config=AutoConfig.from_pretrained(text_path),
        audio_base={"name": audio_path, "fingerprint": fingerprint(audio_path)},
        text_base={"name": text_path, "fingerprint": fingerprint(text_path)},
        audio_token_id=add_audio_token(tokenizer),
        **config_values,
    )
    model = _load_and_join(config, audio_path, text_path, options)
    extractor = AutoFeatureExtractor.from_pretrained(audio_path)
    template, _ = listening_template(tokenizer)
    processor = Qwen3AudioProcessor.for_model(extractor, tokenizer, model.config, template)
    return model, processor


def _load_and_join(
    config: Qwen3AudioConfig, audio_path: str, text_path: str, options: LoadOptions
) -> Qwen3AudioForConditionalGeneration:
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
        return _find(name, PROJECTOR_FILE) is not None
    except OSError:  # no such repository, or no network: whoever loads it from there says so better
        return False


def read_trained_config(name: str | os.PathLike) -> Qwen3AudioConfig:
    config = Qwen3AudioConfig.from_pretrained(name)
    if config.text_base is None or config.audio_base is None:
        raise CheckpointError(
            f"{name}/config.json names no bases (audio_base, text_base): it was not written by qwhisper"
        )
    return config


def load_trained(
    name: str | os.PathLike,
    options: LoadOptions = LoadOptions(),
    *,
    audio_model: str | None = None,
    text_model: str | None = None,
) -> Qwen3AudioForConditionalGeneration:
    """The bases that the folder names, then its projector and adapter. LoRA and projector come back trainable.

    audio_model, text_model: where the bases lie now, if they have moved; their fingerprints must agree. Raises
    UsageError, CheckpointError for another base, before anything is loaded.
    """
    config = read_trained_config(name)
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
    adapter, projector, encoder = (_find(name, file) for file in (ADAPTER_FILE, PROJECTOR_FILE, ENCODER_FILE))
    if projector is None:
        raise CheckpointError(f"{name} has no {PROJECTOR_FILE}: it was not written by qwhisper, or not wholly")
    try:
        if adapter is not None:
            _load_adapter(model, adapter)
        model.model.multi_modal_projector.load_state_dict(load_file(projector))
        if encoder is not None:
            model.model.audio_tower.load_state_dict(load_file(encoder))
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{name}: its weights do not fit this model ({error})") from error


def _load_adapter(model: Qwen3AudioForConditionalGeneration, file: Path) -> None:
    tensors = load_file(file)
    if not getattr(model, "peft_config", None):
        inject(model, LoraConfig.from_pretrained(str(file.parent)))
        dtype = next(iter(tensors.values())).dtype
        for _, parameter in lora_parameters(model):
            parameter.data = parameter.data.to(dtype)
    expected = get_peft_model_state_dict(model, adapter_name=ADAPTER).keys()
    if expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())
        raise ValueError(f"{len(odd)} LoRA weights are in the file or in the model alone, the first: {odd[0]}")
    set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
