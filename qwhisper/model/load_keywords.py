"""The keywords of `from_pretrained`: what each does for a folder of trained weights, and why some are refused there.

For a whole model they go to transformers, except that only the language model is quantised.
"""

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from qwhisper.errors import UsageError
from qwhisper.model.bases import AUDIO_TOWER, DEFAULT_OPTIONS, LoadOptions
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.device_map import for_bases

# Where files come from. A base has its own repository: a revision is the folder's alone.
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
HUB = (*ACCESS, "revision", "subfolder")
PLACES = ("max_memory", "offload_folder", "offload_buffers")  # of the language model's layers
OWN = ("attn_implementation", "audio_model", "text_model", "output_loading_info")
# Values that match what is done here anyway; None stands for any value.
NO_CHANGE: dict[str, Any] = {
    "low_cpu_mem_usage": None, "use_safetensors": True, "weights_only": True, "use_kernels": False,
    "ignore_mismatched_sizes": False, "offload_state_dict": None, "allow_all_kernels": False,
}  # fmt: skip
REASONS = {
    "ignore_mismatched_sizes": "a trained weight of another shape is an error: random ones would take its place",
    "use_safetensors": "its weights are safetensors files",
    "weights_only": "its weights are safetensors files",
    "variant": "its files have fixed names",
    "state_dict": "load the model, then call its load_state_dict",
    "key_mapping": "its weights have fixed names",
    "gguf_file": "its weights are safetensors files",
    "tp_plan": "the model is loaded by one process",
    "tp_size": "the model is loaded by one process",
    "device_mesh": "the model is loaded by one process",
    "distributed_config": "the model is loaded by one process",
    "load_in_8bit": "give load_in_4bit=True or a BitsAndBytesConfig(load_in_4bit=True)",
    "use_kernels": "qwhisper chooses its kernels itself",
}


@dataclass(frozen=True, kw_only=True)
class UserOptions(LoadOptions):
    """LoadOptions, and further keywords of transformers.

    quantization_config: 4-bit bitsandbytes, for the language model. downloads: keywords for those of its bases.
    places: where its layers go, with `device_map`. Encoder and projector stay in memory also if it says disk.
    """

    quantization_config: BitsAndBytesConfig | None = None
    downloads: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, Any] = field(default_factory=dict)

    @property
    def access(self) -> Mapping[str, Any]:
        return self.downloads

    def language_model_keywords(self) -> dict[str, Any]:
        given = {} if self.quantization_config is None else {"quantization_config": self.quantization_config}
        return super().language_model_keywords() | given | dict(self.places)


def current_names(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords without None, the names that only Auto classes pass, and with `dtype` for its deprecated name."""
    # The Auto classes add keywords such as _from_auto, and adapter_kwargs with the user's keywords.
    keywords = keywords | (keywords.pop("adapter_kwargs", None) or {})
    keywords = {key: value for key, value in keywords.items() if value is not None and not key.startswith("_")}
    if "torch_dtype" in keywords:
        warnings.warn("torch_dtype is the deprecated name of dtype", FutureWarning, stacklevel=4)
        keywords.setdefault("dtype", keywords["torch_dtype"])
        del keywords["torch_dtype"]
    return keywords


def hub_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say where files come from."""
    return {key: keywords[key] for key in HUB if keywords.get(key) is not None}


def trained_options(
    name: str | os.PathLike,
    keywords: dict[str, Any],
    as_trained: Mapping[str, Any],
    cls: type[PreTrainedModel],
    config: Qwen3AudioConfig,
) -> UserOptions:
    """The options for a folder of trained weights.

    as_trained: values of LoadOptions that hold if they are not given. cls, config: of the model. Raises UsageError for
    a keyword that has no effect there.
    """
    keywords = {key: value for key, value in keywords.items() if not _changes_nothing(key, value)}
    known = [each.name for each in fields(LoadOptions)]
    taken = [*known, "quantization_config", *HUB, *PLACES]
    if unknown := sorted(keywords.keys() - taken):
        reasons = [f"{key} ({_reason(key)})" if _reason(key) else key for key in unknown]
        raise UsageError(
            f"{name} holds trained weights alone; loading it does not take {', '.join(reasons)}. It takes "
            f"{', '.join([*taken, *OWN])}"
        )
    values = dict(as_trained) | {key: value for key, value in keywords.items() if key in known}
    if "quantization_config" in keywords:
        quantization = _four_bit(name, keywords["quantization_config"])
        values |= {"quantization_config": quantization, "load_in_4bit": True}
    if isinstance(values.get("device_map"), dict):
        values["device_map"] = for_bases(values["device_map"], cls, config, DEFAULT_OPTIONS.device)
    return UserOptions(
        **values,
        downloads={key: keywords[key] for key in ACCESS if key in keywords and key != "force_download"},
        places={key: keywords[key] for key in PLACES if key in keywords},
    )


def _changes_nothing(key: str, value: Any) -> bool:
    return key in NO_CHANGE and (NO_CHANGE[key] is None or NO_CHANGE[key] == value)


def _reason(key: str) -> str:
    if key in REASONS:
        return REASONS[key]
    if hasattr(GenerationConfig(), key):
        return "give it to generate, or set it in the loaded model's generation_config"
    if key in {each.name for each in fields(Qwen3AudioConfig)}:
        return "trained weights have their own config: set it in the loaded model's config"
    return ""


def _four_bit(name: str | os.PathLike, given: Any) -> BitsAndBytesConfig:
    """A copy of the given configuration for the language model, whose head stays as it is."""
    config = BitsAndBytesConfig.from_dict(dict(given)) if isinstance(given, dict) else copy.deepcopy(given)
    if not isinstance(config, BitsAndBytesConfig) or not config.load_in_4bit:
        raise UsageError(
            f"{name}: LoRA is trained on a language model in 4 bits or in full. Give "
            "quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...), or leave it out"
        )
    config.llm_int8_skip_modules = sorted({*(config.llm_int8_skip_modules or ()), "lm_head"})
    return config


def quantised_text_alone(given: Any) -> Any:
    """For a whole model: a bitsandbytes configuration that leaves out all but the language model's layers."""
    of_dict = isinstance(given, dict) and given.get("quant_method", "bitsandbytes") == "bitsandbytes"
    if not isinstance(given, BitsAndBytesConfig) and not of_dict:
        return given
    config = BitsAndBytesConfig.from_dict(dict(given)) if isinstance(given, dict) else copy.deepcopy(given)
    left_out = {AUDIO_TOWER, "model.multi_modal_projector", "lm_head"}
    config.llm_int8_skip_modules = sorted({*(config.llm_int8_skip_modules or ()), *left_out})
    return config
