"""Memory that runs out, and trackers and logs that fail."""

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
from transformers import Trainer

from hf_faults import plain
from hf_faults.observe import CRASHED, Bench, Plant, Seen, Verdict, ending, how_it_broke, judge, no_such_part, redirect
from hf_faults.processes import in_evaluation
from tests.test_faults.kill_shim import fail, in_child
from tests.test_faults.test_logger import fails_in, pipe_without_reader


def out_of_memory(*args, **kwargs) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (planted)")


def ended(bench: Bench, plant: Plant, **values) -> Verdict:
    """With the steps that were done and not saved."""
    seen = bench.train(plant, **values)
    verdict = judge(bench.clean(**values), seen)
    saved = max((int(name.split("-")[1]) for name in seen.checkpoints), default=0)
    lost = seen.steps - saved
    text = f"; {lost} step{'s' * (lost != 1)} not saved" if not seen.finished and lost else ""
    return Verdict(verdict.kind, verdict.outcome + text, verdict.seen)


def in_forward(is_hit: Callable[[Trainer, dict], bool]) -> Plant:
    def plant(trainer: Trainer) -> None:
        honest = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            if is_hit(trainer, inputs):
                out_of_memory()
            return honest(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    return plant


def in_second_backward(trainer: Trainer) -> None:
    """After another micro-batch of the step has left its gradients."""
    honest, calls = torch.Tensor.backward, []

    def backward(self, *args, **kwargs):
        calls.append(1)
        return out_of_memory() if len(calls) == 2 else honest(self, *args, **kwargs)

    torch.Tensor.backward = backward


def in_call(number: int, owner: Callable[[Trainer], object], method: str) -> Plant:
    """In that call, counted from 1, of a method of what `owner` finds in the trainer."""

    def plant(trainer: Trainer) -> None:
        honest, calls = getattr(owner(trainer), method), []

        def planted(*args, **kwargs):
            calls.append(1)
            return out_of_memory() if len(calls) == number else honest(*args, **kwargs)

        setattr(owner(trainer), method, planted)

    return plant


def while_loading(bench: Bench) -> Verdict:
    """A script that loads its models is not yet in Trainer's hands."""
    output = bench.fresh() / "output.txt"

    def work() -> None:
        redirect(output)
        plain.build_from_bases = out_of_memory
        plain.Script.on(bench.bases)

    seen = Seen()
    seen.ended, seen.message = ending(in_child(work), False, output.read_text().splitlines())
    return Verdict(CRASHED, how_it_broke(seen), seen.facts)


def tracker(event: str) -> Plant:
    return lambda trainer: trainer.add_callback(fails_in(event)())


def log_on_a_full_disk(bench: Bench) -> Verdict:
    """TensorBoard's event file takes nothing from the first line on."""
    folder = bench.fresh()

    def plant(trainer: Trainer) -> None:
        honest = builtins.open

        def opened(path, mode="r", *args, **kwargs):
            if "tfevents" in str(path) and set(mode) & set("wa"):
                file = honest(path, mode, *args, **kwargs)
                return FullDisk(file)
            return honest(path, mode, *args, **kwargs)

        builtins.open = io.open = opened

    seen = bench.train(plant, report_to="tensorboard", folder=folder / "run")
    sizes = [path.stat().st_size for path in folder.rglob("*tfevents*")]
    assert sizes and not any(sizes), f"the logs were written: {sizes}"
    verdict = judge(bench.clean(), seen)
    return Verdict(verdict.kind, f"{verdict.outcome} (TensorBoard's log is empty)", verdict.seen)


def output_to_a_pipe_that_nobody_reads(trainer: Trainer) -> None:
    """A line at a time, as PYTHONUNBUFFERED has it: else Trainer would meet it with the first 8 KB."""
    sys.stdout = os.fdopen(pipe_without_reader(), "w", buffering=1)


class FullDisk:
    """A file that opens, and takes no byte."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data):
        fail(errno.ENOSPC)()


CASES = {
    "out of memory in the forward pass": partial(
        ended, plant=in_forward(lambda trainer, inputs: trainer.state.global_step == 3)
    ),
    "out of memory in the backward pass, after other packs have left their gradients": partial(
        ended, plant=in_second_backward
    ),
    "out of memory in an evaluation": lambda bench: ended(
        bench, lambda trainer: in_evaluation(trainer, out_of_memory), eval_file=bench.train_file
    ),
    "held-out dialogues that don't fit into memory": lambda bench: ended(
        bench, lambda trainer: in_evaluation(trainer, out_of_memory), eval_file=bench.train_file
    ),
    "memory that runs out while a bad step is looked into": lambda bench: no_such_part("it looks for no cause"),
    "a sample of a bad step that does not fit into memory alone": lambda bench: no_such_part("it runs no step again"),
    "host memory that runs out in a snapshot": lambda bench: no_such_part("it takes no snapshots to go back to"),
    "out of memory in mid-run": partial(
        ended, plant=in_forward(lambda trainer, inputs: trainer.state.global_step == 5)
    ),
    "out of memory in a save": partial(
        ended, plant=in_call(2, lambda trainer: trainer, "_save_optimizer_and_scheduler"), save_steps=1
    ),
    "out of memory while the models are loaded": while_loading,
    "out of memory in the optimizer's step": partial(
        ended, plant=in_call(3, lambda trainer: torch.optim.AdamW, "step"), save_steps=1
    ),
    "one sample that does not fit by itself": partial(
        ended, plant=in_forward(lambda trainer, inputs: 3 in inputs["dialogue"].tolist())
    ),
    "a tracker fails while logging": partial(ended, plant=tracker("on_log")),
    "a tracker can't be reached when the run begins": partial(ended, plant=tracker("on_train_begin")),
    "the disk is full when a log is written": log_on_a_full_disk,
    "the reader of the pipe that a run prints to is gone": partial(ended, plant=output_to_a_pipe_that_nobody_reads),
}
