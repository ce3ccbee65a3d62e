"""Check that a run can be resumed from what is saved beside a checkpoint's weights: for every resume, and for `verify`.

Optimizer, generators and snapshots must fit the parameters that are trained, and the files that `state.json` names must
be those that were saved with it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qwhisper.checkpoint.folders import read_manifest
from qwhisper.errors import CheckpointError
from qwhisper.guards.snapshot import KEPT, TRIED, WEIGHT
from qwhisper.model.lora import ADAPTER
from qwhisper.model.saving import ADAPTER_FILE, ENCODER_FILE, PROJECTOR_FILE, adapter_folder
from qwhisper.model.weights import ENCODER, PROJECTOR
from qwhisper.train.resume import check_arguments, saved_arguments
from qwhisper.train.state import GENERATOR_FILE, OPTIMIZER_FILE, TrainState, read_tensors

SNAPSHOT_FILE = "snapshots.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's
STEP_KEY = re.compile(r"(\d{1,19})\|(\d{1,9})\|(\w+)")


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
    files += [(file, "") for file in sorted(folder.glob("model*.safetensors")) if whole]
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
