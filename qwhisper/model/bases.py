"""The two bases: find them by folder or hub id, fingerprint them, load each in its compute dtype.

No fp32 copy of the language model is made, and Whisper's decoder is never loaded.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from qwhisper.errors import UsageError
from qwhisper.model.attention import PACKED_ATTENTION, attention_for
from qwhisper.model.audio_embedding import device_of
from qwhisper.model.base_kinds import refuse_other_format, refuse_other_kind
from qwhisper.model.encoder import TrueLengthWhisperEncoder
from qwhisper.model.loss import head_logits
from qwhisper.model.pretrained import UntrustedCodeError, load_causal_lm, load_config, load_whisper_encoder

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ENCODER_KEYS = {r"^(model\.)?encoder\.": ""}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

AUDIO_TOWER = "model.audio_tower"  # the encoder in a device map by our names
NO_ACCESS: Mapping[str, Any] = MappingProxyType({})
DISK = "disk"  # transformers' name, in a device map that is a dictionary
SPREADING_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' names: over all available devices


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is loaded into memory.

    dtype: of the language model and the encoder: "bf16", "fp16", "fp32", a torch dtype or its name; "auto": see
    `compute_dtype`.
    device_map: as in transformers, for the language model; None: all of it on the first accelerator, or the CPU.
    Raises UsageError if it names one device that does not exist.
    load_in_4bit: NF4 for the language model's linear layers. whisper_cpu: keep the encoder on the CPU.
    projector_fp32: the projector in fp32 instead of `dtype`.
    """

    dtype: str | torch.dtype = "auto"
    device_map: str | dict | None = None
    load_in_4bit: bool = False
    whisper_cpu: bool = False
    projector_fp32: bool = True

    def __post_init__(self) -> None:
        if self._whole is not None:
            _refuse_missing_device(self._whole)

    @property
    def _whole(self) -> str | int | torch.device | None:
        """The one device that `device_map` names for everything, or None."""
        if isinstance(self.device_map, dict):
            return None if self.device_map.get("") == DISK else self.device_map.get("")
        return None if self.device_map in SPREADING_MAPS else self.device_map

    @property
    def device(self) -> torch.device:
        """The encoder's device: the one that `device_map` names for everything, else the first accelerator."""
        if self._whole is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self._whole)

    @property
    def access(self) -> Mapping[str, Any]:
        """Keywords for downloads of the bases."""
        return NO_ACCESS

    @property
    def encoder_device(self) -> torch.device:
        """The CPU with `whisper_cpu`, else the one that a map by our names gives it, else `device`."""
        if self.whisper_cpu:
            return torch.device("cpu")
        place = self.device_map.get(AUDIO_TOWER) if isinstance(self.device_map, dict) else None
        return self.device if place is None else torch.device(place)

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

    def language_model_keywords(self) -> dict[str, Any]:
        """The keywords of transformers' `from_pretrained` that place and quantise the language model."""
        device_map = self.device_map or {"": self.device}
        if isinstance(device_map, dict):
            device_map = {key: place for key, place in device_map.items() if key != AUDIO_TOWER}
        quantization = four_bit_config(self.compute_dtype) if self.load_in_4bit else None
        return {"device_map": device_map, "quantization_config": quantization}


def refuse_missing_devices(device_map: str | int | torch.device | Mapping[str, Any] | None) -> None:
    """Raise UsageError if a device map names a device that does not exist."""
    if isinstance(device_map, Mapping):
        for place in device_map.values():
            if place != DISK:
                _refuse_missing_device(place)
    elif device_map is not None and device_map not in SPREADING_MAPS:
        _refuse_missing_device(device_map)


def _refuse_missing_device(name: str | int | torch.device) -> None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = [] if accelerator is None else [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or (device.type != "cpu" and f"{device.type}:{device.index or 0}" not in there):
        raise UsageError(f"there is no device {str(name)!r} for PyTorch here: give one of {', '.join(['cpu', *there])}")


DEFAULT_OPTIONS = LoadOptions()


def resolve_model(name: str, hub: str, flag: str, access: Mapping[str, Any] = NO_ACCESS) -> str:
    """A folder's absolute path or a hub id that transformers can load; with `hub` "modelscope" the folder it was
    downloaded to.
    """
    refuse_other_format(name, flag)
    if hub == "modelscope" and not Path(name).is_dir():
        try:
            from modelscope import snapshot_download
        except ImportError:
            raise UsageError("--hub modelscope needs its package: pip install modelscope") from None
        name = snapshot_download(name)
    try:
        config = load_config(name, **access)
    except UntrustedCodeError:
        raise
    except UsageError as error:
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        found = (
            "a folder without a usable config.json" if Path(name).is_dir() else f"no folder here or model at {where}"
        )
        raise UsageError(
            f"{flag} {name}: {found}. Give a folder with config.json and weights, or a hub id. ({error})"
        ) from None
    refuse_other_kind(config, name, flag)
    return os.path.abspath(name) if os.path.isdir(name) else name


def find_file(name: str | os.PathLike, file: str, **access: Any) -> Path | None:
    """A file of a folder or a hub repository, downloaded if need be; None if it has no such file.

    access: keywords of `cached_file`, such as token.
    """
    found = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, **access)
    return None if found is None else Path(found)


def _weight_files(name: str, access: Mapping[str, Any]) -> list[Path]:
    """The weight files that transformers would load from this folder, shards sorted by name."""
    found = next(
        (path for path in (find_file(name, file, **access) for file in WEIGHT_FILES) if path is not None), None
    )
    if found is None:
        raise UsageError(f"{name} has no weights: none of {', '.join(WEIGHT_FILES)} is there")
    if found.suffix != ".json":
        return [found]
    shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(cached_file(name, shard, **access)) for shard in shards]


def fingerprint(name: str, access: Mapping[str, Any] = NO_ACCESS) -> str:
    """SHA-256 over a base's configuration and the beginning, end and size of each of its weight files: quick."""
    digest = hashlib.sha256(Path(cached_file(name, "config.json", **access)).read_bytes())
    for file in _weight_files(name, access):
        if not file.is_file():  # reading a device may never end
            raise UsageError(f"{file} is no regular file")
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(1 << 16))
            handle.seek(max(0, size - (1 << 16)))
            digest.update(handle.read())
    return digest.hexdigest()


def refuse_missing(what: str, name: str, info: dict) -> None:
    """Refuse missing weights: transformers would initialise them at random, with only a warning."""
    missing = sorted([*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])])
    if missing:
        raise UsageError(
            f"{what} {name}: {len(missing)} weights are missing or of another shape, the first: {missing[0]}"
        )


def load_encoder(
    name: str, *, dtype: torch.dtype, device: torch.device, access: Mapping[str, Any] = NO_ACCESS
) -> TrueLengthWhisperEncoder:
    """The encoder alone, frozen and in evaluation mode, from a whole Whisper checkpoint or from one of the encoder."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # transformers would list the decoder's unused weights one by one
    try:
        encoder, info = load_whisper_encoder(
            name,
            key_mapping=ENCODER_KEYS,
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            **access,
        )
    finally:
        hf_logging.set_verbosity(verbosity)
    refuse_missing("--audio_model", name, info)
    return encoder.to(device).requires_grad_(False).eval()


def load_language_model(name: str, options: LoadOptions) -> PreTrainedModel:
    """Any causal LM, frozen, with attention over packed rows; optionally quantised during loading."""
    language_model, info = load_causal_lm(
        name,
        dtype=options.compute_dtype,
        attn_implementation=attention_for(load_config(name, **options.access)),
        **options.language_model_keywords(),
        **options.access,
    )
    refuse_missing("--text_model", name, info)
    keep_4bit_layout(language_model)
    _refuse_other_head(name, language_model)
    return language_model.requires_grad_(False).eval()


def keep_4bit_layout(model: nn.Module) -> None:
    """Keep the layout of 4-bit weights on a CPU with AVX-512 BF16, where bitsandbytes would change it.

    It would repack them in the first pass in evaluation mode, and fail if a size is no multiple of 32 (rows) or of its
    block of 64 (columns). Afterwards no gradient would pass through them, not even in training mode.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def _refuse_other_head(name: str, language_model: PreTrainedModel) -> None:
    """Refuse models that scale their logits: the loss applies the head directly and would be silently wrong."""
    language_model.eval()
    ids = torch.arange(4, device=device_of(language_model.get_input_embeddings()))[None]
    passed: list[torch.Tensor] = []  # the head's input, of the same pass: a pass reads all weights
    hook = language_model.base_model.register_forward_hook(lambda _, inputs, output: passed.append(output[0]))
    try:
        theirs = language_model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    softcap = getattr(language_model.config, "final_logit_softcapping", None)
    ours = head_logits(passed[0], language_model.get_output_embeddings(), softcap)
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise UsageError(
            f"--text_model {name}: its logits are more than lm_head(hidden_states), which is not supported"
        )


def four_bit_config(dtype: torch.dtype):
    """NF4 with double quantisation for the LM's linear layers except its head; not for encoder and projector."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],  # replaces the defaults
    )
