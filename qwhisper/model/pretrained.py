"""All calls of transformers' loaders: they never run code from a folder and never ask on stdin.

transformers asks "[y/N]" if `trust_remote_code` is None; here it is always False. An `auto_map` is then ignored if a
class of transformers or qwhisper fits, and refused otherwise. A test checks that other modules use these functions.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from qwhisper.checkpoint.names import ADAPTER_CONFIG, MODEL_CONFIG
from qwhisper.errors import QwhisperError, UsageError, first_line
from qwhisper.files import files_of, read_json_object
from qwhisper.memory import is_of_the_machine
from qwhisper.model.encoder import TrueLengthWhisperEncoder

NO_CODE = {"trust_remote_code": False}
# Files that the loaders below open. Logs and optimizer files of any size beside them do no harm.
BASE_FILES = (
    "config.json", "generation_config.json", "*_config.json", "*token*.json", "*.jinja", "vocab*", "merges.txt",
    "*.model", "model*.safetensors*", "pytorch_model*.bin*", "chat_template*",
)  # fmt: skip
# Parsing a configuration makes one list entry per layer or label, so a large number can fill the memory.
MOST = (("layer", 1000), ("num_", 1_000_000))


class UntrustedCodeError(UsageError):
    """A base model needs Python code from its own folder, which is never run."""


def load_config(name: str | os.PathLike, flag: str = "", **access: Any) -> PreTrainedConfig:
    """A base's configuration. Like all functions here, raises UsageError if the base can't be loaded.

    flag: the flag that named the base, for the message. access: keywords for downloads, such as token.
    """
    with _loading(name, "model", flag):
        return AutoConfig.from_pretrained(name, **access, **NO_CODE)


def load_tokenizer(name: str | os.PathLike, flag: str = "") -> PreTrainedTokenizerBase:
    """A base's tokenizer; arguments and errors as for `load_config`."""
    with _loading(name, "tokenizer", flag):
        return AutoTokenizer.from_pretrained(name, **NO_CODE)


def load_feature_extractor(name: str | os.PathLike, flag: str = ""):
    """A base's feature extractor; arguments and errors as for `load_config`."""
    with _loading(name, "feature extractor (preprocessor_config.json)", flag):
        return AutoFeatureExtractor.from_pretrained(name, **NO_CODE)


def load_causal_lm(name: str, **kwargs) -> tuple[Any, dict]:
    """(model, loading info), with the keywords of `from_pretrained`."""
    with _loading(name, "language model"):
        return AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs, **NO_CODE)


def load_whisper_encoder(name: str, **kwargs) -> tuple[TrueLengthWhisperEncoder, dict]:
    """The same for the encoder of a Whisper checkpoint."""
    with _loading(name, "Whisper encoder"):
        return TrueLengthWhisperEncoder.from_pretrained(name, output_loading_info=True, **kwargs, **NO_CODE)


@contextmanager
def _loading(name: str | os.PathLike, what: str, flag: str = "") -> Iterator[None]:
    """Turn a library's exception for a folder that it can't use into a UsageError; out of memory passes unchanged."""
    try:
        if Path(name).is_dir():
            check_base(Path(name))
        yield
    except QwhisperError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        where = f"{flag} {name}".lstrip()
        if "trust_remote_code" in str(error):
            raise UntrustedCodeError(
                f"{where}: its {what} needs Python code from the model's folder, which is never run. "
                "Take a model whose architecture transformers knows, or export this one to such an architecture"
            ) from None
        if "device_map" in str(error):  # of transformers and bitsandbytes
            raise UsageError(f"{where}: its {what} can't be placed as device_map says ({first_line(error)})") from error
        if isinstance(error, pickle.UnpicklingError):  # transformers' message explains how to run the code
            raise UsageError(
                f"{where}: the {what}'s weights are a pickle with more than tensors in it, which is never loaded; take "
                "a model in safetensors"
            ) from None
        raise UsageError(
            f"{where}: no {what} can be read there ({type(error).__name__}: {first_line(error)}); give a folder or hub "
            "id that has one, or copy it from the model that this one was made from"
        ) from error


def check_base(folder: Path) -> None:
    """Raise UsageError for a base's folder with pipes instead of files, with implausible sizes, or with an adapter."""
    files = files_of(folder, UsageError, patterns=BASE_FILES)
    if ADAPTER_CONFIG in files:
        raise UsageError(
            f"{folder} has an adapter ({ADAPTER_CONFIG}), which would be loaded with the model: merge it into the "
            "model first"
        )
    if MODEL_CONFIG in files:
        check_config_numbers(read_json_object(files[MODEL_CONFIG], UsageError), folder / MODEL_CONFIG, UsageError)


def check_config_numbers(value: Any, file: Path, fault: type[QwhisperError], key: str = "") -> None:
    """Raise `fault` for a number of layers or labels that would fill the memory during parsing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            check_config_numbers(inner, file, fault, str(name))
    elif isinstance(value, list):
        for inner in value:
            check_config_numbers(inner, file, fault, key)
    elif isinstance(value, int):
        for part, most in MOST:
            if part in key and abs(value) > most:
                raise fault(f"{file}: {key} is {value:.4g}, and no model has more than {most}")
