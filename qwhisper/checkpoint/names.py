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
ADAPTER_FOLDER = "adapter"  # below a whole model: beside config.json, transformers would load the adapter itself
WHOLE_WEIGHTS = "model*.safetensors"


def checkpoint_name(step: int) -> str:
    return f"{PREFIX}{step}"


def is_checkpoint_name(name: Any) -> bool:
    """Whether this is exactly checkpoint-N: a name without a path, of a folder in the same run."""
    return isinstance(name, str) and re.fullmatch(rf"{PREFIX}[0-9]+", name) is not None


def step_in_name(folder: Path) -> int | None:
    """The N of checkpoint-N, also of the hidden name that a kill during a replacement leaves; else None."""
    found = re.fullmatch(rf"{PREFIX}([0-9]+)|\.{PREFIX}([0-9]+){re.escape(OLD)}", folder.name)
    return int(found[1] or found[2]) if found else None


def adapter_folder(folder: Path) -> Path:
    """The adapter's folder in a saved folder, if it has one: itself for trained weights, below it for a whole model."""
    return folder if (folder / PROJECTOR_FILE).is_file() else folder / ADAPTER_FOLDER
