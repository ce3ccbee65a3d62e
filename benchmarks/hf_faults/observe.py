"""Trains in a forked child, writes down what is seen, and says it in a sentence. Nothing here knows what to expect."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from kill9 import checkpoint_folders
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_faults.plain import LAST_STEP, Script
from tests.test_faults.broken_data import write_dialogues
from tests.test_faults.kill_shim import in_child
from tests.train.helpers import same_bits

SECONDS = 12  # of a run of about one second: after that it hangs
# What a fault may come to, from bad to good.
POISONED, SILENT, UNRESUMABLE, HUNG, CRASHED, HARMLESS, NONE = (
    "poisoned", "silent", "not resumable", "hung", "crashed", "harmless", "no such part",
)  # fmt: skip
Plant = Callable[[Trainer], object]


@dataclass
class Verdict:
    """kind: one of the words above. outcome: the sentence. seen: the facts that it is made of."""

    kind: str
    outcome: str
    seen: dict = field(default_factory=dict)


def no_such_part(what: str) -> Verdict:
    return Verdict(NONE, f"no such part: {what}")


@dataclass
class Seen:
    """What became of a run. ended: "finished", the name of an error, of a signal, or "hung"."""

    ended: str = "hung"
    message: str = ""
    steps: int = 0
    nan_from: int | None = None  # the first step after which a weight is not finite
    logs: list[dict] = field(default_factory=list)
    visits: dict[str, int] = field(default_factory=dict)  # how often each dialogue was trained on
    best: str | None = None
    said: list[str] = field(default_factory=list)  # what a run without a fault does not print
    checkpoints: dict[str, bool] = field(
        default_factory=dict
    )  # whether all weights in them are finite, None: unreadable
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # those that are trained, at the end
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def facts(self) -> dict:
        """For the results: short, and without tensors."""
        losses = [log["loss"] for log in self.logs if "loss" in log]
        kept = ("ended", "message", "steps", "nan_from", "checkpoints", "said")
        facts = {
            name: value for name, value in asdict(self).items() if name in kept and value not in ("", [], {}, None)
        }
        return facts | ({"losses": [round(loss, 3) for loss in losses]} if losses else {})

    @property
    def finished(self) -> bool:
        return self.ended == "finished"

    def logged(self, name: str) -> list[float]:
        return [log[name] for log in self.logs if name in log]


class Watch(TrainerCallback):
    """Writes to a file after every step, so that a kill leaves what was seen until then."""

    def __init__(self, trainer: Trainer, told: Path):
        self.trainer, self.told = trainer, told
        self.seen = Seen(ended="")
        honest = trainer.training_step

        def training_step(model, inputs, *args):
            for number in inputs["dialogue"].tolist() if "dialogue" in inputs else ():
                self.seen.visits[f"d{number}"] = self.seen.visits.get(f"d{number}", 0) + 1
            return honest(model, inputs, *args)

        trainer.training_step = training_step

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.steps = state.global_step
        finite = all(bool(torch.isfinite(p).all()) for p in self.trainer.model.parameters() if p.requires_grad)
        if not finite and self.seen.nan_from is None:
            self.seen.nan_from = state.global_step
        self.write()

    def write(self) -> None:
        self.seen.logs = self.trainer.state.log_history
        self.seen.best = self.trainer.state.best_model_checkpoint
        self.told.write_text(json.dumps(asdict(self.seen)))


class Bench:
    """Where the faults are planted: the script, its eight spoken dialogues, and what a run without a fault gives."""

    def __init__(self, scratch: Path, bases: tuple[Path, Path]):
        self.scratch, self.bases = scratch, bases
        self.script = Script.on(bases)
        self.train_file = write_dialogues(scratch / "data")
        self._usual_lines: set[str] = set()
        self._folders = iter(range(10**6))
        self._clean: dict[str, Seen] = {}
        self._usual_lines = set(self.clean().said)

    def clean(self, **values) -> Seen:
        """The run without a fault. values: of `train`."""
        key = repr(sorted(values.items()))
        if key not in self._clean:
            self._clean[key] = self.train(**values)
            assert self._clean[key].finished, self._clean[key].message
        return self._clean[key]

    def fresh(self) -> Path:
        """An empty folder."""
        folder = self.scratch / f"run{next(self._folders)}"
        folder.mkdir()
        return folder

    def train(
        self,
        plant: Plant | None = None,
        *,
        folder: Path | None = None,
        train_file: Path | None = None,
        resume: bool | str = False,
        callbacks=(),
        script: Script | None = None,
        limit: float = SECONDS,
        **values,
    ) -> Seen:
        """One training in a child. plant: is given the trainer before it begins. resume: from the newest checkpoint, or
        the one of this path. values: of `Script.trainer`."""
        own = self.fresh()
        folder = folder or own / "run"
        told, output = own / "told.json", own / "output.txt"

        def work() -> None:
            redirect(output)
            trainer = (script or self.script).trainer(folder, train_file or self.train_file, **values)
            watch = Watch(trainer, told)
            for callback in (watch, *callbacks):
                trainer.add_callback(callback)
            if plant:
                plant(trainer)
            trainer.train(resume_from_checkpoint=resume or None)
            watch.write()
            torch.save(weights_of(trainer.model), own / LAST_STEP)

        began = time.monotonic()
        code = in_child(work, kill_after=limit)
        seen = Seen(**json.loads(told.read_text())) if told.exists() else Seen()
        lines = output.read_text(errors="replace").splitlines()
        seen.ended, seen.message = ending(code, time.monotonic() - began >= limit, lines)
        if seen.finished:
            seen.weights, seen.frozen = torch.load(own / LAST_STEP, weights_only=True)
        if code == 0:
            told_lines = dict.fromkeys(stripped(line)[:200] for line in lines if line.strip() and line[0] != "{")
            seen.said = [line for line in told_lines if line not in self._usual_lines and "mtime may not" not in line]
        seen.checkpoints = {f"checkpoint-{step}": finite_weights(folder, step) for step in checkpoint_folders(folder)}
        return seen


def same_weights(a: Seen, b: Seen) -> bool:
    return same_bits(a.weights | a.frozen, b.weights | b.frozen) == []


def weights_of(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(trained, frozen)"""
    trained, frozen = (
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad == is_trained}
        for is_trained in (True, False)
    )
    return trained, frozen


def redirect(output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def stripped(line: str) -> str:
    """Without this machine's folders, and without numbers, which differ in each run."""
    return re.sub(r"\d+", "N", re.sub(r"/\S*/", "", line)).strip()


def ending(code: int, too_long: bool, lines: list[str]) -> tuple[str, str]:
    """(how, message) of a child that ended with `code`; 1: an error, whose traceback is the last that it printed."""
    if code == 0:
        return "finished", ""
    if code < 0:
        return ("hung" if too_long else signal.Signals(-code).name), ""
    last = next(
        (line for line in reversed(lines) if re.match(r"[A-Za-z_.]+(Error|Exception|Interrupt|Exit)\b", line)), ""
    )
    name, _, message = last.partition(": ")
    return name.split(".")[-1].lstrip("_") or "an error", re.sub(r"/\S*/", "", message)[:200]


def finite_weights(folder: Path, step: int) -> bool | None:
    """Of a checkpoint; None if its weights can't be read."""
    try:
        tensors = load_file(folder / f"checkpoint-{step}/model.safetensors")
    except Exception:
        return None
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def when(seen: Seen) -> str:
    return f"after step {seen.steps}" if seen.steps else "before the first step is done"


def how_it_broke(seen: Seen) -> str:
    """Of a run that did not finish."""
    if seen.ended == "hung":
        return f"hangs {when(seen)}: nothing happens for {SECONDS} s, then it was killed"
    if seen.ended.startswith("SIG"):
        return f"dies of {seen.ended} {when(seen)}"
    return f"ends with {seen.ended} {when(seen)}"


def judge(clean: Seen, seen: Seen, silent: str = "", *, clip: bool = False) -> Verdict:
    """clean: the same run without the fault. silent: what a run that finishes with other weights than that has come to.
    clip: the fault is in a file whose name an error should tell."""
    if not seen.finished:
        names = re.search(r"\bd\d\.\w+|'zero'|'touch", seen.message)
        named = "; the message names the file" if names else "; the message does not say where"
        named = named if clip and seen.ended != "hung" else ""
        return Verdict(HUNG if seen.ended == "hung" else CRASHED, how_it_broke(seen) + named, seen.facts)
    if not all(bool(torch.isfinite(weight).all()) for weight in seen.weights.values()):
        return Verdict(POISONED, poisoned(seen), seen.facts)
    if same_weights(clean, seen):
        return Verdict(HARMLESS, "finishes with the same weights as without the fault", seen.facts)
    return Verdict(SILENT, f"finishes{', says nothing' if not seen.said else ''}; {silent}", seen.facts)


def poisoned(seen: Seen) -> str:
    """Of a run that finished with weights that are not finite, by what it logged of it."""
    share = sum(not bool(torch.isfinite(w).all()) for w in seen.weights.values()) / len(seen.weights)
    after = [log["loss"] for log in seen.logs if "loss" in log][(seen.nan_from or 1) - 1 :]
    log = ""
    if after and after[-1] == 0.0:
        norm = next((", grad_norm nan" for log in seen.logs if math.isnan(log.get("grad_norm", 0.0))), "")
        log = f"; logs loss 0.0{norm}{' from then on' if len(after) > 1 else ''}"
    elif after:
        log = f"; the last loss that it logs is {after[-1]:.3g}"
    average = [log["train_loss"] for log in seen.logs if "train_loss" in log]
    log += f", reports an average of {average[-1]:.2f}" if average and math.isfinite(average[-1]) else ""
    of = "all" if share == 1 else f"{share:.0%} of the"
    return f"ends in success with NaN in {of} trained tensors, from step {seen.nan_from} on{log}"
