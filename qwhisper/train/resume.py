"""Checks whether a run can continue from a checkpoint: its arguments, and what is saved besides the weights.

Some arguments may change. Optimizer, generators and snapshots must fit the trained parameters. The files that
`state.json` names must be those that were saved with it. Every resume and `verify` make these checks.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwhisper.checkpoint.facts import read_arguments
from qwhisper.checkpoint.manifest import read_manifest
from qwhisper.checkpoint.names import (
    ADAPTER_FILE,
    ARGUMENTS_FILE,
    ENCODER_FILE,
    GENERATOR_FILE,
    MODEL_CONFIG,
    OPTIMIZER_FILE,
    PROJECTOR_FILE,
    SNAPSHOT_FILE,
    WHOLE_WEIGHTS,
    adapter_folder,
)
from qwhisper.checkpoint.places import absolute, found_again
from qwhisper.errors import CheckpointError, DataError, UsageError
from qwhisper.files import read_json_object
from qwhisper.guards.snapshot import KEPT, TRIED, WEIGHT
from qwhisper.model.adapter_config import read_adapter_config
from qwhisper.model.lora import ADAPTER
from qwhisper.model.weights import ENCODER, PROJECTOR
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.state import TrainState, read_tensors

# Decide what is created when a run begins; a resume reads it from the checkpoint, so another value has no effect.
MADE_AT_THE_START = (
    "use_lora",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_fp32",
    "projector_fp32",
    "freeze_whisper",
    "audio_lead_silence",
    "audio_tail_silence",
)
# Paths, which don't change the result. Fingerprints identify the bases.
PLACES = ("output_dir", "run_name", "resume_from_checkpoint", "init_from", "audio_model", "text_model", "hub")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's
STEP_KEY = re.compile(r"(\d{1,19})\|(\d{1,9})\|(\w+)")


def write_arguments(args: TrainArguments, folder: Path) -> None:
    """Write arguments.json with absolute paths, which name the same files from any current folder."""
    text = json.dumps(absolute(dataclasses.asdict(args)), indent=1)
    (folder / ARGUMENTS_FILE).write_text(text, encoding="utf-8")


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """`read_arguments`, with the type of every flag checked. Raises CheckpointError in the same cases."""
    return read_arguments(
        checkpoint, get_type_hints(TrainArguments), ("output_dir", "load_in_4bit", *MADE_AT_THE_START)
    )


def check_arguments(checkpoint: Path) -> None:
    """Raises CheckpointError if the saved arguments don't agree with the saved model and adapter.

    A run with --init_from has the adapter of that checkpoint, whatever the flags say.
    """
    saved, config = saved_arguments(checkpoint), read_json_object(checkpoint / MODEL_CONFIG)
    are = {name: config.get(name) for name in ("audio_lead_silence", "audio_tail_silence") if saved[name] is not None}
    if not saved.get("init_from"):
        are["use_lora"] = (adapter_folder(checkpoint) / ADAPTER_FILE).is_file()
        if are["use_lora"]:
            adapter = read_adapter_config(adapter_folder(checkpoint))
            are |= {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
    for name, value in are.items():
        if saved[name] != value:
            raise CheckpointError(
                f"{checkpoint}: {ARGUMENTS_FILE} has {name} {saved[name]}, but the checkpoint has {value}"
            )


def changed_arguments(args: TrainArguments, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
    """The flags that differ from the checkpoint's arguments: {name: (value then, value now)}.

    Raises UsageError for a flag that can't change during a run, CheckpointError if the old ones can't be read.
    """
    check_arguments(checkpoint)
    then = absolute(found_again(saved_arguments(checkpoint), checkpoint.absolute().parent))
    now = absolute(json.loads(json.dumps(dataclasses.asdict(args))))
    names = (then.keys() & now.keys()) - set(PLACES)
    changed = {name: (then[name], now[name]) for name in sorted(names) if then[name] != now[name]}
    for name in MADE_AT_THE_START:
        if name in changed:
            was, wanted = changed[name]
            raise UsageError(
                f"--{name} is {wanted}, but {checkpoint} was made with {was}, and it can't change during a run: leave "
                "the flag as it was, or begin a new run with --init_from"
            )
    return changed


def refuse_missing_data(args: TrainArguments) -> None:
    """Raises DataError if the data of a resumed run is not where its flags say."""
    for name in ("train_file", "eval_file", "data_root"):
        path = getattr(args, name)
        if path and not os.path.exists(path):
            raise DataError(f"{path} does not exist: if it has moved, give its path with --{name}")


def output_dir_of(checkpoint: Path) -> Path:
    """The --output_dir of the run that saved the checkpoint, at that time."""
    return Path(saved_arguments(checkpoint).get("output_dir", ""))


def check_resumable(folder: Path, parameters: Mapping[str, Tensor], state: TrainState) -> None:
    """Raises CheckpointError with the first file and entry that no resume can use.

    parameters: the trained ones, by name, in the order of their groups. Only shapes and dtypes are needed, so they may
    be on the meta device.
    """
    for name, parameter in parameters.items():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError(f"{folder}: {name} is not finite; use an older checkpoint")
    moments = read_tensors(folder / OPTIMIZER_FILE)
    _check_entries(folder / OPTIMIZER_FILE, _by_parameter(folder / OPTIMIZER_FILE, moments), parameters, state)
    if not moments and state.supervised_tokens and state.steps_taken and not state.guards.rewinds:
        raise CheckpointError(
            f"{folder / OPTIMIZER_FILE} is empty, although {state.steps_taken} steps were taken: Adam would begin "
            "again; use an older checkpoint"
        )
    _check_generators(folder / GENERATOR_FILE)
    if (folder / SNAPSHOT_FILE).exists():
        _check_snapshots(folder / SNAPSHOT_FILE, parameters, state)
    check_arguments(folder)
    there = read_manifest(folder)["files"]  # already checked against the files
    for name, sha256 in state.saved_with.items():
        if there.get(name, {}).get("sha256") != sha256:
            raise CheckpointError(
                f"{folder}: {name} is not the one that was saved with its state.json (of another run or step, or "
                "changed since); use another checkpoint"
            )


def saved_parameters(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The parameters that a checkpoint's run trains, as `check_resumable` takes them: with the shapes and dtypes of the
    files, in the model's order.
    """
    whole = not (folder / PROJECTOR_FILE).is_file()
    # A whole model always has an encoder; a folder of trained weights only if it was trained.
    with_encoder = not (whole and saved_arguments(folder)["freeze_whisper"])
    trained = [
        name
        for name, parameter in model.named_parameters()
        if (with_encoder if name.startswith(ENCODER) else parameter.requires_grad)
        and not name.endswith("embed_positions.weight")
    ]
    trained.sort(key=lambda name: ("lora_" not in name, not name.startswith(PROJECTOR)))
    files = [(adapter_folder(folder) / ADAPTER_FILE, "")]
    files += [(file, "") for file in sorted(folder.glob(WHOLE_WEIGHTS)) if whole]
    files += [(folder / PROJECTOR_FILE, PROJECTOR), (folder / ENCODER_FILE, ENCODER)]
    saved: dict[str, Tensor] = {}
    for file, prefix in files:
        if file.is_file():
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (no mapping)
                    name = prefix + re.sub(r"\.(lora_[AB])\.", rf".\1.{ADAPTER}.", key)
                    if name in trained:
                        saved[name] = tensors.get_tensor(key).to("meta")
    return {name: saved[name] for name in trained if name in saved}


def _by_parameter(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in tensors.items():
        name, bar, key = entry.rpartition("|")
        if not bar:
            raise CheckpointError(f"{file}: {entry} is not an optimizer entry")
        found.setdefault(name, {})[key] = tensor
    return found


def _check_entries(
    file: Path, entries: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, Tensor], state: TrainState
) -> None:
    """Check moments and step count of each parameter that has any."""
    for name, entry in entries.items():
        if name not in parameters:
            raise CheckpointError(f"{file}: its optimizer state does not fit this run, which does not train {name}")
        if set(entry) != set(MOMENTS):
            raise CheckpointError(f"{file}: {name} has {', '.join(sorted(entry))} instead of {', '.join(MOMENTS)}")
        for key in MOMENTS[:2]:
            _check_like(file, f"{name}|{key}", entry[key], parameters[name])
        if (entry["exp_avg_sq"] < 0).any():
            raise CheckpointError(f"{file}: {name}|exp_avg_sq has a negative value")
        count = entry["step"]
        if count.shape != () or count.dtype != torch.float32:
            raise CheckpointError(f"{file}: {name}|step is {_seen(count)}, not one fp32 number")
        if not 1 <= float(count) <= state.steps_taken or float(count) % 1:
            raise CheckpointError(f"{file}: {name}|step is {float(count):g}, but {state.steps_taken} steps were taken")


def _check_like(file: Path, entry: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise CheckpointError(f"{file}: {entry} is {_seen(tensor)}, but its parameter is {_seen(parameter)}")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file}: {entry} is not finite; use an older checkpoint")


def _seen(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_generators(file: Path) -> None:
    """Load the states into unused generators. A GPU's state can't be tested without a GPU."""
    states = read_tensors(file)
    if "cpu" not in states or not states.keys() <= {"cpu", "cuda"}:
        raise CheckpointError(f"{file}: has generators of {', '.join(sorted(states)) or 'nothing'}, not cpu and cuda")
    for device, values in states.items():
        if values.dtype != torch.uint8 or values.ndim != 1:
            raise CheckpointError(f"{file}: {device} is {_seen(values)}, not a generator state")
        try:
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(values)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{file}: {device} is not a generator state ({error})") from error


def _check_snapshots(file: Path, parameters: Mapping[str, Tensor], state: TrainState) -> None:
    """Check that each copy has every parameter, with fitting moments or none."""
    tensors = read_tensors(file)
    tried = tensors.pop(TRIED, None)
    if tried is None or tried.shape != () or tried.dtype != torch.int64 or not -1 <= int(tried) <= state.step:
        raise CheckpointError(f"{file}: {TRIED} is not a step of this run")
    copies: dict[int, dict[int, dict[str, Tensor]]] = {}
    for entry, tensor in tensors.items():
        key = STEP_KEY.fullmatch(entry)
        if key is None or int(key[1]) > state.step or int(key[2]) >= len(parameters):
            raise CheckpointError(f"{file}: {entry} is not a snapshot entry of this run")
        copies.setdefault(int(key[1]), {}).setdefault(int(key[2]), {})[key[3]] = tensor
    if len(copies) > KEPT:
        raise CheckpointError(f"{file}: holds {len(copies)} snapshots, more than {KEPT}")
    names: Sequence[str] = list(parameters)
    for step, copy in copies.items():
        if len(copy) < len(names):
            raise CheckpointError(f"{file}: the snapshot of step {step} has {len(copy)} of {len(names)} parameters")
        moments = {}
        for index, entries in copy.items():
            weight = entries.pop(WEIGHT, None)
            if weight is None:
                raise CheckpointError(f"{file}: the snapshot of step {step} has no weight of {names[index]}")
            _check_like(file, f"{step}|{index}|{WEIGHT}", weight, parameters[names[index]])
            if entries:
                moments[names[index]] = entries
        _check_entries(file, moments, parameters, state)
