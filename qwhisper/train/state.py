"""All that a resume needs beside the weights: position, counters, optimizer, generators.

JSON and safetensors; nothing is unpickled.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwhisper.errors import CheckpointError
from qwhisper.guards.alarms import Alarms
from qwhisper.guards.ladder import GuardState
from qwhisper.train.learning import Learning
from qwhisper.train.probe import ProbeState

STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
GENERATOR_FILE = "generators.safetensors"


@dataclass
class TrainState:
    """Where a run stands.

    step: optimizer steps done, skipped ones included; epoch and offset: the sampler's position. evaluated: the step of
    the last evaluation. kinds: of question, in the data that was trained on.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    skipped_steps: int = 0
    bad_samples: int = 0
    supervised_tokens: int = 0
    max_tokens_per_pack: int | None = None
    evaluated: int = 0
    best_loss: float | None = None
    best_checkpoint: str | None = None
    train_file_sha256: str | None = None
    kinds: list[str] = field(default_factory=list)
    guards: GuardState = field(default_factory=GuardState)
    alarms: Alarms = field(default_factory=Alarms)
    probe: ProbeState = field(default_factory=ProbeState)
    learning: Learning = field(default_factory=Learning)

    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        """Raises CheckpointError where the file is not what this version of qwhisper writes."""
        path = folder / STATE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                **values
                | {
                    "guards": GuardState.from_dict(values["guards"]),
                    "alarms": Alarms(**values["alarms"]),
                    "probe": ProbeState(**values["probe"]),
                    "learning": Learning(**values.get("learning", {})),  # none in checkpoints of before it was kept
                }
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not as this version of qwhisper writes it ({type(error).__name__}: {error})"
            ) from error


def trained_kinds(folder: Path) -> list[str]:
    """The kinds of question that a checkpoint's run had in its training data; empty where it does not say."""
    return TrainState.load(folder).kinds if (folder / STATE_FILE).is_file() else []


def trained_file_sha256(folder: Path) -> str | None:
    """Of the file that a checkpoint's run was trained on; None where it does not say."""
    return TrainState.load(folder).train_file_sha256 if (folder / STATE_FILE).is_file() else None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file's content, on the CPU. Raises CheckpointError where it is missing or anything else."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable safetensors file ({error})") from error


def save_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], folder: Path) -> None:
    """Each parameter's moments and step count under "name|moment"; parameters never stepped have none."""
    tensors = {}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"{names[parameter]}|{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], folder: Path) -> None:
    """Puts saved moments back, each on its parameter's device.

    Raises KeyError for a parameter that is not trained here, CheckpointError where the file is missing or damaged.
    """
    by_name = {name: parameter for parameter, name in names.items()}
    for entry, value in read_tensors(folder / OPTIMIZER_FILE).items():
        name, key = entry.rsplit("|", 1)
        parameter = by_name[name]
        # Adam's step count stays on the CPU unless the optimizer is fused, as torch itself keeps it.
        on_device = key != "step" or optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = value.to(parameter.device) if on_device else value


def save_generators(folder: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / GENERATOR_FILE)


def load_generators(folder: Path) -> None:
    states = read_tensors(folder / GENERATOR_FILE)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
