"""Read and check the configuration of a folder of trained weights before a model is made from it.

Each file is untrusted JSON: types, ranges and agreement between files are checked here, and any exception of a library
becomes a CheckpointError.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

from qwhisper.checkpoint.names import MODEL_CONFIG, PROCESSOR_CONFIG
from qwhisper.errors import CheckpointError, first_line
from qwhisper.files import files_of, read_json_object
from qwhisper.frames import FrameArithmetic
from qwhisper.memory import is_of_the_machine
from qwhisper.model.configuration_qwen3_audio import Qwen3AudioConfig
from qwhisper.model.pretrained import check_config_numbers

MAX_STACK = 64  # encoder frames in a token: 1.28 s
# Values from which a feature extractor makes its filters, and the largest plausible value of each.
EXTRACTOR = {
    "feature_size": 1024,
    "n_fft": 1 << 16,
    "hop_length": 1 << 16,
    "chunk_length": 3600,
    "sampling_rate": 1 << 20,
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def reading(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Turn a library's exception for a file that it can't use into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        if "trust_remote_code" in str(error):
            what += ": it needs Python code from the folder, which is never run"
        raise CheckpointError(f"{folder}: {what} ({type(error).__name__}: {first_line(error)})") from error


def check_files(name: str | os.PathLike) -> None:
    """Raise CheckpointError for pipes instead of files, or sizes and numbers that no model has."""
    folder = Path(name)
    if folder.is_dir():
        files = files_of(folder)
        if MODEL_CONFIG in files:
            check_config_numbers(read_json_object(files[MODEL_CONFIG]), files[MODEL_CONFIG], CheckpointError)


def read_config(name: str | os.PathLike) -> Qwen3AudioConfig:
    """`config.json` of a folder or hub repository of trained weights. Raises CheckpointError for implausible values."""
    check_files(name)
    with reading(name, f"its {MODEL_CONFIG} can't be used"):
        config = Qwen3AudioConfig.from_pretrained(name, trust_remote_code=False)
        _check_config(config, f"{name}/{MODEL_CONFIG}")
    return config


def _check_config(config: Qwen3AudioConfig, file: str) -> None:
    bases = (config.audio_base, config.text_base)
    if any(base is None for base in bases):
        raise CheckpointError(f"{file} names no bases (audio_base, text_base): it was not written by qwhisper")
    for base in bases:
        if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "fingerprint")):
            raise CheckpointError(f"{file}: a base is {base!r:.80}, not a name and a fingerprint")
    scales = (config.projector_scale, config.projector_init_scale, config.projector_dropout)
    if not (all(map(math.isfinite, scales)) and 0 <= config.projector_dropout < 1):
        raise CheckpointError(f"{file}: projector scale, initial scale and dropout are {scales}")
    if not 1 <= config.projector_stack <= MAX_STACK:
        raise CheckpointError(f"{file}: projector_stack is {config.projector_stack}, not from 1 to {MAX_STACK}")
    if config.projector_hidden_act not in ACT2FN:
        raise CheckpointError(f"{file}: no activation is called {config.projector_hidden_act!r:.40}")
    _ = config.frames  # raises ValueError for lengths that fit no encoder


def frames_of(config: dict[str, Any]) -> FrameArithmetic:
    """The lengths from the values of a `config.json`."""
    return FrameArithmetic(
        stack=config["projector_stack"],
        max_encoder_frames=config["audio_config"]["max_source_positions"],
        lead_silence_s=config["audio_lead_silence"],
        tail_silence_s=config["audio_tail_silence"],
    )


def check_processor(name: str | os.PathLike) -> None:
    """Raise CheckpointError for pipes instead of files, or a processor that no model has."""
    if Path(name).is_dir():
        files = files_of(Path(name))
        own = read_json_object(files[PROCESSOR_CONFIG]) if PROCESSOR_CONFIG in files else {}
        _check_extractors(files, own)


def _check_extractors(files: dict[str, Path], own: dict[str, Any]) -> None:
    if "audio_tokenizer" in own or "audio_tokenizer_config.json" in files:
        raise CheckpointError(f"{PROCESSOR_CONFIG} names an audio tokenizer, which would be downloaded")
    found = {PROCESSOR_CONFIG: own.get("feature_extractor")}
    if "preprocessor_config.json" in files:
        found["preprocessor_config.json"] = read_json_object(files["preprocessor_config.json"])
    for file, values in found.items():
        if values is None:
            continue
        if not isinstance(values, dict):
            raise CheckpointError(f"{files[file]}: its feature extractor is {values!r:.40}")
        for name, most in EXTRACTOR.items():
            if name in values and not (type(values[name]) is int and 1 <= values[name] <= most):
                raise CheckpointError(f"{files[file]}: {name} is {values[name]!r:.40}, not from 1 to {most}")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Trained weights by name, on the CPU. Raises CheckpointError if they are not floating-point numbers."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: no readable safetensors file ({error})") from error
    if not tensors:
        raise CheckpointError(f"{file} holds no weights")
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{file}: {name} is {tensor.dtype}, no kind of number that weights have")
    return tensors
