"""Trainings that are killed again and again until they end, and what became of them.

For tests/test_faults/test_process.py and benchmarks/kill9.py, which does the same to a plain HF Trainer.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
from transformers import TrainerCallback

from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.places import CONFIG_FILE
from qwhisper.checkpoint.reading import newest_usable
from qwhisper.cli import main as command_line
from qwhisper.report.events import read_jsonl
from qwhisper.train import loop
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.run import main
from tests.test_faults.kill_shim import Operations, in_child
from tests.train.helpers import checkpoint_tensors, same_bits

Save = Callable[[], object]


class Trainer(Protocol):
    """What is killed. A folder holds one training, its checkpoints and what it tells of itself."""

    def train(self, folder: Path, around_save: Callable[[Save], object]) -> None:
        """From the beginning, or from what is there, to the end. Each save goes through `around_save`."""

    def reached(self, folder: Path) -> int:
        """Steps that were done."""

    def saved(self, folder: Path) -> int:
        """Steps that a resume goes on from."""

    def end_state(self, folder: Path) -> dict[str, torch.Tensor]: ...

    def give_up(self, folder: Path) -> None:
        """What a user does where a resume ends in an error: removes the newest checkpoint."""


@dataclass(frozen=True)
class Kill:
    """seconds: after the start, whatever goes on then. Or in the `save`-th save, counted from 0, after that share of
    its operations."""

    seconds: float | None = None
    save: int = 0
    share: float = 0.0


@dataclass
class Life:
    """How one training went. lost: steps done again after each kill; errors: of resumes."""

    kills: int = 0
    in_save: int = 0
    lost: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def random_kills(generator: random.Random, *, seconds: float, saves: int, in_save: float) -> Iterator[Kill]:
    """Endless; a share of `in_save` inside saves, the others at any moment of an uninterrupted run's `seconds`."""
    while True:
        if generator.random() < in_save:
            yield Kill(save=generator.randrange(saves), share=generator.random())
        else:
            yield Kill(seconds=generator.uniform(0, seconds))


class Lives:
    """Trains in forks of this process, first without a kill: `seconds` and `operations` (of each save) are of that."""

    def __init__(self, trainer: Trainer, scratch: Path):
        self.trainer = trainer
        self.scratch = scratch
        scratch.mkdir(parents=True)
        told = scratch / "counted.json"
        counts: list[int] = []

        def counted(save: Save) -> object:
            with Operations(scratch / "whole") as operations:
                result = save()
            counts.append(len(operations.seen))
            told.write_text(json.dumps(counts))
            return result

        began = time.monotonic()
        code = self._child(scratch / "whole", counted, None)
        assert code == 0, f"the uninterrupted run ended with {code}: {(scratch / 'output.txt').read_text()[-3000:]}"
        self.seconds = time.monotonic() - began
        self.operations: list[int] = json.loads(told.read_text())
        self.expected = trainer.end_state(scratch / "whole")

    def live(self, kills: Iterator[Kill]) -> Life:
        """One training, killed as `kills` say, resumed after each, until it ends by itself."""
        life, folder = Life(), self.scratch / "life"
        shutil.rmtree(folder, ignore_errors=True)
        while True:
            kill = next(kills, None)
            code = self._child(folder, self._killing(folder, kill), kill.seconds if kill else None)
            if code == 0:
                break
            if code == -signal.SIGKILL:
                life.kills += 1
                life.in_save += kill is not None and kill.seconds is None
                life.lost.append(self.trainer.reached(folder) - self.trainer.saved(folder))
            else:
                life.errors.append((self.scratch / "output.txt").read_text().strip().splitlines()[-1])
                self.trainer.give_up(folder)
        life.different = same_bits(self.expected, self.trainer.end_state(folder))
        return life

    def _killing(self, folder: Path, kill: Kill | None) -> Callable[[Save], object]:
        if kill is None or kill.seconds is not None:
            return lambda save: save()
        saves = iter(range(10**6))

        def around(save: Save) -> object:
            number = next(saves)
            if number != kill.save:
                return save()
            with Operations(folder, at=int(kill.share * self.operations[min(number, len(self.operations) - 1)])):
                return save()

        return around

    def _child(self, folder: Path, around_save: Callable[[Save], object], kill_after: float | None) -> int:
        def work() -> None:
            output = os.open(self.scratch / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            self.trainer.train(folder, around_save)

        return in_child(work, kill_after=kill_after)


class Qwhisper:
    """Resumed by the command that it prints itself."""

    def __init__(self, args: TrainArguments):
        self.args = args

    def train(self, folder: Path, around_save: Callable[[Save], object]) -> None:
        honest = loop.save_checkpoint
        saving = mock.patch.object(loop, "save_checkpoint", lambda run: around_save(lambda: honest(run)))
        with saving:
            if checkpoints(folder):
                code = command_line(["train", "--config", str(folder / CONFIG_FILE), "--resume_from_checkpoint"])
            else:
                code = main(TrainArguments(**vars(self.args) | {"output_dir": str(folder)}))
        assert code == 0, f"exit code {code}"

    def reached(self, folder: Path) -> int:
        return max((record["step"] for record in read_jsonl(folder / "metrics.jsonl")), default=0)

    def saved(self, folder: Path) -> int:
        newest, _ = newest_usable(folder)
        return int(newest.name.split("-")[-1].removesuffix(".old")) if newest else 0

    def end_state(self, folder: Path) -> dict[str, torch.Tensor]:
        """Every saved tensor, and the loss of every step as it was last computed: other samples give another."""
        losses = {record["step"]: record["loss"] for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record}
        steps = range(1, self.args.max_steps + 1)
        computed = torch.tensor([losses[step] for step in steps], dtype=torch.float64)
        return checkpoint_tensors(folder / f"checkpoint-{self.args.max_steps}") | {"losses": computed}

    def give_up(self, folder: Path) -> None:
        newest, _ = newest_usable(folder)
        shutil.rmtree(newest or folder)


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def end_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(folder / f"checkpoint-{step}")
