"""The state that a resume needs besides the weights: position, counters, optimizer, random generators.

Stored as JSON and safetensors; nothing is unpickled.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qwhisper.checkpoint.facts import refuse_another_step
from qwhisper.checkpoint.names import GENERATOR_FILE, OPTIMIZER_FILE, STATE_FILE, is_checkpoint_name
from qwhisper.data.source import Position, check_position, epoch_position
from qwhisper.errors import CheckpointError
from qwhisper.files import read_json
from qwhisper.guards.alarms import Alarms
from qwhisper.guards.snapshot import was_stepped
from qwhisper.guards.state import LARGEST_SCALE as LARGEST
from qwhisper.guards.state import SMALLEST_SCALE as SMALLEST
from qwhisper.guards.state import GuardState
from qwhisper.train.learning import Learning
from qwhisper.train.probe import ProbeState
from qwhisper.typed_json import ADDED_LATER, from_json


@dataclass
class TrainState:
    """The position and counters of a run.

    step: optimizer steps done, skipped ones included. position: of the source of dialogues, in the source's own format.
    evaluated: step of the last evaluation. kinds: kinds of question in the training data. saved_with: SHA-256 of the
    tensor files of the same save, by name; empty in checkpoints that are older than this field. execution: of packs,
    see `Executor`.
    """

    step: int = 0
    position: Position = None
    skipped_steps: int = 0
    bad_samples: int = 0
    supervised_tokens: int = 0
    max_tokens_per_pack: int | None = None
    execution: str | None = field(default=None, metadata=ADDED_LATER)
    evaluated: int = 0
    best_loss: float | None = None
    best_checkpoint: str | None = None
    train_file_sha256: str | None = None
    kinds: list[str] = field(default_factory=list)
    guards: GuardState = field(default_factory=GuardState)
    alarms: Alarms = field(default_factory=Alarms)
    probe: ProbeState = field(default_factory=ProbeState)
    learning: Learning = field(default_factory=Learning, metadata=ADDED_LATER)
    saved_with: dict[str, str] = field(default_factory=dict, metadata=ADDED_LATER)

    @property
    def steps_taken(self) -> int:
        """Steps in which the optimizer stepped."""
        return self.step - self.skipped_steps

    def write(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        """Read state.json. Raises CheckpointError if this version of qwhisper does not write such a file, or if its
        step is not the manifest's.
        """
        path = folder / STATE_FILE
        values = read_json(path)
        try:
            if isinstance(values, dict) and "position" not in values:  # in older checkpoints
                values["position"] = epoch_position(values.pop("epoch", None), values.pop("offset", None))
            state = from_json(cls, values)
            state._check()
            if "told" not in values["guards"]["clamp"]:  # in older checkpoints: don't report the count again
                state.guards.clamp.told = state.guards.clamp.clamped
        except ValueError as error:
            raise CheckpointError(f"{path}: not as this version of qwhisper writes it ({error})") from error
        refuse_another_step(folder, state.step)
        return state

    def _check(self) -> None:
        """Raises ValueError for numbers that no run reaches."""
        counters = {
            name: value for name, value in vars(self).items() if isinstance(value, int) and not isinstance(value, bool)
        }
        guards = {name: value for name, value in vars(self.guards).items() if isinstance(value, int)}
        for name, value in (counters | guards).items():
            if value < 0:
                raise ValueError(f"{name} is {value}")
        for name in ("skipped_steps", "evaluated"):
            if counters[name] > self.step:
                raise ValueError(f"{name} is {counters[name]} of {self.step} steps")
        check_position(self.position)
        if self.max_tokens_per_pack == 0:
            raise ValueError("max_tokens_per_pack is 0")
        for name, factor in (("lr_factor", self.guards.lr_factor), ("rate.factor", self.guards.rate.factor)):
            if not 0 < factor <= 1:
                raise ValueError(f"guards.{name} is {factor}")
        if not SMALLEST <= self.guards.loss_scale.scale <= LARGEST:
            raise ValueError(f"guards.loss_scale.scale is {self.guards.loss_scale.scale}")
        if self.best_checkpoint is not None and not is_checkpoint_name(self.best_checkpoint):
            raise ValueError(f"best_checkpoint is {self.best_checkpoint!r:.80}, no checkpoint's name")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError if it is missing or can't be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable safetensors file ({error})") from error


def write_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], folder: Path) -> None:
    """Write each parameter's moments and step count under "name|moment"; parameters never stepped have none."""
    tensors = {}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items() if was_stepped(moments) else ():
            tensors[f"{names[parameter]}|{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / OPTIMIZER_FILE)


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str], folder: Path) -> None:
    """Load saved moments, each to its parameter's device; `check_resumable` has checked that they fit."""
    by_name = {name: parameter for parameter, name in names.items()}
    for entry, value in read_tensors(folder / OPTIMIZER_FILE).items():
        name, key = entry.rsplit("|", 1)
        parameter = by_name[name]
        # As in torch, Adam's step count is on the CPU unless the optimizer is fused.
        on_device = key != "step" or optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = value.to(parameter.device) if on_device else value


def write_generators(folder: Path) -> None:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, folder / GENERATOR_FILE)


def load_generators(folder: Path) -> None:
    states = read_tensors(folder / GENERATOR_FILE)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
