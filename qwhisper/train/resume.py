"""Whether a run can go on from a checkpoint: with these arguments, and with what is saved beside the weights.

Arguments may change, some of them. Optimizer, generators and snapshots must fit the parameters that are trained, and
the files that `state.json` names must be those that were saved with it: for every resume, and for `verify`.
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

# Made when the run began and read from the checkpoint since: another value would have no effect.
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
# Say where things lie, not what is computed. The bases are told apart by their fingerprints.
PLACES = ("output_dir", "run_name", "resume_from_checkpoint", "init_from", "audio_model", "text_model", "hub")
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's
STEP_KEY = re.compile(r"(\d{1,19})\|(\d{1,9})\|(\w+)")


def write_arguments(args: TrainArguments, folder: Path) -> None:
    """With absolute paths: what is loaded from another current folder finds the same files."""
    text = json.dumps(absolute(dataclasses.asdict(args)), indent=1)
    (folder / ARGUMENTS_FILE).write_text(text, encoding="utf-8")


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """`read_arguments` with every flag checked. Raises CheckpointError as that does."""
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
    """Name to (value then, value now) of the flags that differ from the checkpoint's arguments.

    Raises UsageError for one that can't be changed on the way, CheckpointError where the old ones can't be read.
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
                f"--{name} is {wanted}, but {checkpoint} was made with {was}, which can't be changed on the way: leave "
                "the flag as it was, or begin a new run with --init_from"
            )
    return changed


def refuse_missing_data(args: TrainArguments) -> None:
    """Raises DataError where the data of a run that is resumed does not lie where its config.yaml says."""
    for name in ("train_file", "eval_file", "data_root"):
        path = getattr(args, name)
        if path and not os.path.exists(path):
            raise DataError(f"{path} does not exist: if it has moved, give its place with --{name}")


def output_dir_of(checkpoint: Path) -> Path:
    """Of the run that saved it, as it was called then."""
    return Path(saved_arguments(checkpoint).get("output_dir", ""))


def check_resumable(folder: Path, parameters: Mapping[str, Tensor], state: TrainState) -> None:
    """Raises CheckpointError naming the first file and entry that no resume can use.

    parameters: those that are trained, by name, in the order of their groups; their shapes and dtypes are looked at,
    so they may be on the meta device.
    """
    for name, parameter in parameters.items():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError(f"{folder}: {name} is not finite; go on from an older checkpoint")
    moments = read_tensors(folder / OPTIMIZER_FILE)
    _check_entries(folder / OPTIMIZER_FILE, _by_parameter(folder / OPTIMIZER_FILE, moments), parameters, state)
    if not moments and state.supervised_tokens and state.steps_taken and not state.guards.rewinds:
        raise CheckpointError(
            f"{folder / OPTIMIZER_FILE} holds nothing, although {state.steps_taken} steps were taken: Adam would begin "
            "again; go on from an older checkpoint"
        )
    _check_generators(folder / GENERATOR_FILE)
    if (folder / SNAPSHOT_FILE).exists():
        _check_snapshots(folder / SNAPSHOT_FILE, parameters, state)
    check_arguments(folder)
    there = read_manifest(folder)["files"]  # which was found to be right, or nothing of this would be read
    for name, sha256 in state.saved_with.items():
        if there.get(name, {}).get("sha256") != sha256:
            raise CheckpointError(
                f"{folder}: {name} is not the one that was saved with its state.json (of another run or step, or "
                "changed since); go on from another checkpoint"
            )


def saved_parameters(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The parameters that the run of a checkpoint trains, as `check_resumable` takes them: shapes and dtypes of the
    files, in the model's order.
    """
    whole = not (folder / PROJECTOR_FILE).is_file()
    # A whole model has an encoder in any case; a folder of trained weights only where it was trained.
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
            raise CheckpointError(f"{file}: {entry} is no entry of an optimizer")
        found.setdefault(name, {})[key] = tensor
    return found


def _check_entries(
    file: Path, entries: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, Tensor], state: TrainState
) -> None:
    """Moments and step count of each parameter that has any."""
    for name, entry in entries.items():
        if name not in parameters:
            raise CheckpointError(f"{file}: its optimizer state does not fit this run ({name} is not trained in it)")
        if set(entry) != set(MOMENTS):
            raise CheckpointError(
                f"{file}: of {name} it has {', '.join(sorted(entry))} in place of {', '.join(MOMENTS)}"
            )
        for key in MOMENTS[:2]:
            _check_like(file, f"{name}|{key}", entry[key], parameters[name])
        if (entry["exp_avg_sq"] < 0).any():
            raise CheckpointError(f"{file}: {name}|exp_avg_sq has a negative square")
        count = entry["step"]
        if count.shape != () or count.dtype != torch.float32:
            raise CheckpointError(f"{file}: {name}|step is {_seen(count)}, not one fp32 number")
        if not 1 <= float(count) <= state.steps_taken or float(count) % 1:
            raise CheckpointError(f"{file}: {name}|step is {float(count):g} after {state.steps_taken} steps were taken")


def _check_like(file: Path, entry: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise CheckpointError(f"{file}: {entry} is {_seen(tensor)} where its parameter is {_seen(parameter)}")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{file}: {entry} is not finite; go on from an older checkpoint")


def _seen(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_generators(file: Path) -> None:
    """Load the states into unused generators; a GPU's state can't be tried without a GPU."""
    states = read_tensors(file)
    if "cpu" not in states or not states.keys() <= {"cpu", "cuda"}:
        raise CheckpointError(f"{file}: holds generators of {', '.join(sorted(states)) or 'nothing'}, not cpu and cuda")
    for device, values in states.items():
        if values.dtype != torch.uint8 or values.ndim != 1:
            raise CheckpointError(f"{file}: {device} is {_seen(values)}, no state of a generator")
        try:
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(values)
        except (RuntimeError, TypeError) as error:
            raise CheckpointError(f"{file}: {device} is no state of a generator ({error})") from error


def _check_snapshots(file: Path, parameters: Mapping[str, Tensor], state: TrainState) -> None:
    """Each copy has every parameter, with moments that fit it or none."""
    tensors = read_tensors(file)
    tried = tensors.pop(TRIED, None)
    if tried is None or tried.shape != () or tried.dtype != torch.int64 or not -1 <= int(tried) <= state.step:
        raise CheckpointError(f"{file}: {TRIED} is no step of this run")
    copies: dict[int, dict[int, dict[str, Tensor]]] = {}
    for entry, tensor in tensors.items():
        key = STEP_KEY.fullmatch(entry)
        if key is None or int(key[1]) > state.step or int(key[2]) >= len(parameters):
            raise CheckpointError(f"{file}: {entry} is no entry of a snapshot of this run")
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
