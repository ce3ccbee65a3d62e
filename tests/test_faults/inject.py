"""Faults planted into a real small run, and what became of the run."""

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import soundfile
import torch

from qwhisper.engine.executor import Executor
from qwhisper.errors import QwhisperError
from qwhisper.report.events import acts, read_jsonl
from qwhisper.train import loop
from qwhisper.train.run import main
from tests.train.helpers import checkpoint_tensors, read_lines

Effect = Callable[[Executor, torch.Tensor], torch.Tensor | None]


@dataclass
class Outcome:
    """How a run ended: its exit code (None: it crashed), the acts of its guards, its last checkpoint's tensors."""

    code: int | None
    message: str
    events: list[dict] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return bool(self.tensors) and all(bool(torch.isfinite(t.float()).all()) for t in self.tensors.values())

    def ids(self, kind: str) -> set[str]:
        """Of all samples that events of this kind name."""
        named = [sample for event in self.events if event["kind"] == kind for sample in event["samples"]]
        return {sample["id"] if isinstance(sample, dict) else sample for sample in named}

    @property
    def dropped(self) -> set[tuple[int, str]]:
        """(step, id) of every sample that was dropped."""
        drops = [event for event in self.events if event["kind"] == "dropped_samples"]
        return {(event["step"], sample["id"]) for event in drops for sample in event["samples"]}

    def count(self, kind: str) -> int:
        return sum(event["kind"] == kind for event in self.events)


def device_memory_runs_out(*args, **kwargs) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (planted)")


def host_memory_runs_out(*args, **kwargs) -> None:
    """PyTorch's own error, which is a plain RuntimeError."""
    torch.empty(1 << 60)


both_memories = pytest.mark.parametrize("run_out", [device_memory_runs_out, host_memory_runs_out])


OTHER_ARGUMENTS = re.compile("unexpected keyword argument|positional argument|keyword-only argument|multiple values")


def raise_if_a_patch_is_stale(error: Exception) -> None:
    """Raise an error that says that the code and a patch do not fit: other arguments, or a name that is missing.

    Taken for an outcome, it would pass for a fault without its guard, and prove nothing about the guard.
    """
    missing = isinstance(error, AttributeError | NameError | ImportError)
    if missing or (isinstance(error, TypeError) and OTHER_ARGUMENTS.search(str(error))):
        raise error


def outcome_of(args, callbacks=()) -> Outcome:
    """Runs a training to its end, whatever that is."""
    try:
        code, message = main(args, callbacks), ""
    except QwhisperError as error:
        code, message = error.exit_code, str(error)
    except Exception as error:  # a crash is an outcome, and no guarantee allows it
        raise_if_a_patch_is_stale(error)
        code, message = None, repr(error)
    folder = Path(args.output_dir)
    events = acts(read_jsonl(folder / "events.jsonl"))
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return Outcome(code, message, events, checkpoint_tensors(found[-1]) if found else {})


def plant(monkeypatch, effect: Effect, *, samples: set[str] | None = None, calls: range | None = None) -> None:
    """`effect(executor, loss)` after each forward and backward pass that has one of `samples` in it, or after those
    numbered `calls`, counted from 0. It may change gradients, and return another loss."""
    honest, count = Executor.run_packs, iter(range(10**9))

    def planted(self, given, num_supervised):
        step, call = honest(self, given, num_supervised), next(count)
        hit = any(s.id in samples for s in given) if samples is not None else calls is None or call in calls
        if not (hit and torch.is_grad_enabled()):
            return step
        changed = effect(self, step.loss)
        return step if changed is None else replace(step, loss=changed)

    monkeypatch.setattr(Executor, "run_packs", planted)


def loss_times(value: float) -> Effect:
    return lambda executor, loss: loss * value


def _gradients(executor: Executor) -> list[torch.Tensor]:
    return [p.grad for p in executor.model.parameters() if p.grad is not None]


def gradient_element(value: float) -> Effect:
    """One element of the first gradient."""

    def effect(executor, loss):
        _gradients(executor)[0].view(-1)[0] = value

    return effect


def gradients_times(value: float) -> Effect:
    def effect(executor, loss):
        torch._foreach_mul_(_gradients(executor), value)

    return effect


SAMPLE_EFFECTS = {
    "NaN loss": loss_times(math.nan),
    "infinite loss": loss_times(-math.inf),
    "NaN gradient element": gradient_element(math.nan),
    "infinite gradient element": gradient_element(math.inf),
    "gradients × 1e30": gradients_times(1e30),
}


@dataclass
class RandomFaults:
    """Faults at random for a soak: what hits a sample in a step is decided by (seed, step, sample) alone, so that it
    happens again when the sample is run again. A share of the steps gets a peak of ×10 to ×1e12 in all gradients."""

    share: float
    seed: int
    samples: set[tuple[int, str]] = field(default_factory=set)  # (step, id) that were hit
    peaks: dict[int, float] = field(default_factory=dict)  # step -> factor

    def effect_on(self, step: int, sample_id: str) -> Effect | None:
        generator = random.Random(f"{self.seed}|{step}|{sample_id}")
        return SAMPLE_EFFECTS[generator.choice(list(SAMPLE_EFFECTS))] if generator.random() < self.share else None

    def plant(self, monkeypatch) -> None:
        honest_step, honest_run = loop.train_step, Executor.run_packs
        now = {"step": 0, "first": True}

        def train_step(run, fetched):
            now.update(step=run.state.step, first=True)
            return honest_step(run, fetched)

        def run_packs(executor, given, num_supervised):
            step = honest_run(executor, given, num_supervised)
            if not torch.is_grad_enabled():
                return step
            generator = random.Random(f"{self.seed}|{now['step']}")
            if now["first"] and generator.random() < self.share:
                self.peaks[now["step"]] = 10 ** generator.uniform(1, 12)
                gradients_times(self.peaks[now["step"]])(executor, step.loss)
            now["first"] = False
            for sample in given:
                if effect := self.effect_on(now["step"], sample.id):
                    self.samples.add((now["step"], sample.id))
                    changed = effect(executor, step.loss)
                    step = step if changed is None else replace(step, loss=changed)
            return step

        monkeypatch.setattr(loop, "train_step", train_step)
        monkeypatch.setattr(Executor, "run_packs", run_packs)


def audio_parts(record: dict) -> list[dict]:
    parts = [
        part for message in record["messages"] if isinstance(message["content"], list) for part in message["content"]
    ]
    return [part for part in parts if part["type"] == "audio"]


def spoil_clips(train_file: Path, target: Path, share: float, seed: int) -> set[str]:
    """Copies the dialogues to `target`, a share of them with a clip that can't be used; returns their ids."""
    records, generator = read_lines(train_file), random.Random(seed)
    for record in records:
        for part in audio_parts(record):
            part["audio"] = str((train_file.parent / part["audio"]).resolve())
    spoken = [record for record in records if audio_parts(record)]
    chosen = generator.sample(spoken, max(1, round(share * len(records))))
    target.parent.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(chosen):
        part = audio_parts(record)[0]
        bad = target.parent / f"bad-{number}.wav"
        spoil(Path(part["audio"]), bad, number % 4, generator)
        part["audio"] = str(bad)
    target.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {record["id"] for record in chosen}


def spoil(clip: Path, bad: Path, kind: int, generator: random.Random) -> None:
    """Random bytes, truncated, one NaN sample, or silence."""
    if kind == 0:
        bad.write_bytes(generator.randbytes(4000))
    elif kind == 1:
        bad.write_bytes(clip.read_bytes()[:40])
    else:
        waveform, rate = soundfile.read(clip, dtype="float32")
        waveform = 0 * waveform if kind == 3 else waveform
        waveform[len(waveform) // 2] = math.nan if kind == 2 else 0.0
        soundfile.write(bad, waveform, rate, subtype="FLOAT")
