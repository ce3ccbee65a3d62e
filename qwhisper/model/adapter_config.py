"""Read `adapter_config.json` of a checkpoint without PEFT's reader.

PEFT reads module names in five fields as regular expressions, imports the module that `megatron_core` names, and some
of its initialisations change the base's weights. Here the fields that qwhisper's adapters use are checked; any other
must have the value that switches it off.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from qwhisper.checkpoint.names import ADAPTER_CONFIG
from qwhisper.errors import CheckpointError
from qwhisper.files import read_json_object
from qwhisper.model.lora import LANGUAGE_MODEL, target_regex

MAX_RANK = 1 << 16
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
IGNORED = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "inference_mode")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _by_name(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(NAME.fullmatch(k) and check(v) for k, v in value.items())


def is_target(value: Any) -> bool:
    """Plain names, or the pattern that `target_regex` makes from them: matching any other pattern may never end."""
    if isinstance(value, list | set):
        return bool(value) and all(isinstance(name, str) and NAME.fullmatch(name) for name in value)
    start = rf"{re.escape(LANGUAGE_MODEL)}\..+\.("
    if not isinstance(value, str) or not (value.startswith(start) and value.endswith(")")):
        return False
    names = value[len(start) : -1].replace("\\", "").split("|")
    return all(NAME.fullmatch(name) for name in names) and target_regex(names) == value


# Allowed values of a field other than PEFT's default.
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value in (None, "CAUSAL_LM"),
    "r": _is_rank,
    "lora_alpha": lambda value: _is_number(value) and value > 0,
    "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "target_modules": is_target,
    "rank_pattern": _by_name(_is_rank),
    "alpha_pattern": _by_name(_is_number),
    "init_lora_weights": lambda value: value in (True, False, "gaussian"),
    "use_rslora": lambda value: value is True,
    "use_dora": lambda value: value is True,
    "lora_bias": lambda value: value is True,
    "fan_in_fan_out": lambda value: value is True,
}


def read_adapter_config(folder: Path) -> LoraConfig:
    """Raise CheckpointError for a missing field, or a value that qwhisper would not write."""
    file = folder / ADAPTER_CONFIG
    values = read_json_object(file)
    defaults = LoraConfig().to_dict()
    taken = {}
    for name in ("peft_type", "r", "lora_alpha", "target_modules"):
        if name not in values:
            raise CheckpointError(f"{file}: {name} is missing")
    for name, value in values.items():
        if name in IGNORED or name not in defaults:
            continue
        if name in ALLOWED and ALLOWED[name](value):
            taken[name] = value
        elif value not in (defaults[name], None, False) and value != [] and value != {}:
            raise CheckpointError(f"{file}: {name} is {value!r:.80}, which no adapter of qwhisper has")
        elif name in ("peft_type", "r", "lora_alpha", "target_modules"):
            raise CheckpointError(f"{file}: {name} is {value!r:.80}")
    return LoraConfig(**taken)
