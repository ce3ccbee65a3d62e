"""Names of a run's checkpoints and of the files in them, declared only here."""

import re
from pathlib import Path
from typing import Any

PREFIX = "checkpoint-"  # and the step
OLD = ".old"  # end of the hidden name of a checkpoint that is being replaced

# Every checkpoint of a run has these.
MANIFEST = "manifest.json"
ARGUMENTS_FILE = "arguments.json"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
GENERATOR_FILE = "generators.safetensors"
SNAPSHOT_FILE = "snapshots.safetensors"  # only if the newest snapshot is of an earlier step

# Trained weights alone, or the whole model.
MODEL_CONFIG = "config.json"
PROCESSOR_CONFIG = "processor_config.json"
PROJECTOR_FILE = "projector.safetensors"
ENCODER_FILE = "encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER = "adapter"  # of a whole model: beside its config.json, transformers would load it in its own way
WHOLE_WEIGHTS = "model*.safetensors"


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step}"


def is_checkpoint_name(name: Any) -> bool:
    """Whether this is checkpoint-N and nothing else, so that it names a folder beside the one that mentions it."""
    return isinstance(name, str) and re.fullmatch(rf"{PREFIX}[0-9]+", name) is not None


def step_in_name(folder: Path) -> int | None:
    """The N of checkpoint-N, also under the hidden name that a kill during its replacement leaves; else None."""
    found = re.fullmatch(rf"{PREFIX}([0-9]+)|\.{PREFIX}([0-9]+){re.escape(OLD)}", folder.name)
    return int(found[1] or found[2]) if found else None


def adapter_folder(folder: Path) -> Path:
    """Where the adapter of a saved folder lies, if it has one: beside trained weights, below a whole model."""
    return folder if (folder / PROJECTOR_FILE).is_file() else folder / ADAPTER_FOLDER
