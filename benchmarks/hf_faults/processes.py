"""Processes that are killed or get a signal to end, and two at once."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kill9 import PlainTrainer, checkpoint_folders, kill_until, small_run, summary
from transformers import Trainer, TrainerCallback

from hf_faults.disk import resume
from hf_faults.numerical import at_step
from hf_faults.observe import (
    CRASHED,
    HARMLESS,
    SILENT,
    UNRESUMABLE,
    Bench,
    Plant,
    Verdict,
    how_it_broke,
    judge,
    no_such_part,
    same_weights,
)
from hf_faults.plain import STEPS, Dialogues
from tests.small import write_dialogues as write_many
from tests.test_faults.broken_data import write_dialogues
from tests.test_faults.kill_shim import in_child, kill
from tests.test_faults.lives import Lives
from tests.test_faults.test_process import worker_pids

# Kills in a run.


def killed_then_resumed(bench: Bench, plant: Plant, **values) -> Verdict:
    folder = bench.fresh()
    seen = bench.train(plant, folder=folder, **values)
    if seen.ended != "SIGKILL":
        return judge(bench.clean(**values), seen)
    lost = seen.steps - max(checkpoint_folders(folder), default=0)
    verdict = resume(bench, folder, **values)
    return Verdict(verdict.kind, f"{verdict.outcome} ({lost} step{'s' * (lost != 1)} done again)", verdict.seen)


def kill_in_step(trainer: Trainer) -> None:
    class Kill(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                kill()

    trainer.add_callback(Kill())


def kill_in_evaluation(trainer: Trainer) -> None:
    in_evaluation(trainer, lambda: kill() if trainer.state.global_step == 4 else None)


def in_evaluation(trainer: Trainer, act: Callable[[], object]) -> None:
    honest = trainer.prediction_step

    def prediction_step(*args, **kwargs):
        act()
        return honest(*args, **kwargs)

    trainer.prediction_step = prediction_step


def twenty_kills(bench: Bench) -> Verdict:
    scratch = bench.fresh()
    lives = Lives(PlainTrainer(small_run(scratch / "small", dataloader_num_workers=0)), scratch / "lives")
    found = summary(kill_until(lives, random.Random(4), 20, 1), 0.0)
    failed, other = found["resumes_that_ended_in_an_error"], found["runs_that_ended_in_other_bits"]
    text = (
        f"of {found['kills']} kills, {found['kills_in_saves']} of them in saves, {failed} leave a run that can't be "
        f"resumed, {other} one that ends in other weights"
    )
    return Verdict(UNRESUMABLE if failed else SILENT if other else HARMLESS, text, found)


# Signals. As in the tests nothing was saved before them.


def signalled(bench: Bench, plant: Plant, **values) -> Verdict:
    seen = bench.train(plant, save_steps=100, **values)
    if seen.finished:
        return judge(bench.clean(), seen)
    saved = "it leaves a checkpoint" if seen.checkpoints else "no checkpoint is written"
    return Verdict(CRASHED, f"{how_it_broke(seen)}; {saved}", seen.facts)


def terminate(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_in_evaluation(bench: Bench) -> Verdict:
    return signalled(
        bench, lambda trainer: in_evaluation(trainer, partial(terminate, trainer)), eval_file=bench.train_file
    )


def interrupt_while_waiting(bench: Bench) -> Verdict:
    """In the second epoch the worker that reads d3 interrupts the trainer and gives nothing."""

    def plant(trainer: Trainer) -> None:
        main, honest = os.getpid(), Dialogues.__getitem__

        def getitem(self, index):
            if index == 3 and trainer.state.global_step >= 2 and os.getpid() != main:
                os.kill(main, signal.SIGINT)
                time.sleep(3)
            return honest(self, index)

        Dialogues.__getitem__ = getitem
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return signalled(bench, plant, dataloader_num_workers=1)


# Processes that read data.


def with_workers(bench: Bench, plant: Plant, **more) -> Verdict:
    """On more dialogues than are read ahead."""
    values = more | {"train_file": bench.scratch / "many/train.jsonl", "dataloader_num_workers": 2}
    if not values["train_file"].exists():
        write_many(values["train_file"].parent, 40)
    return judge(bench.clean(**values), bench.train(plant, **values))


def to_workers(number: int, *, all_of_them: bool) -> Plant:
    def act(trainer: Trainer) -> None:
        for pid in worker_pids()[: None if all_of_them else 1]:
            os.kill(pid, number)
        time.sleep(0.5)  # until they are dead, if they die of it

    return at_step(3, act)


def kills_reader(numbers: set[int], how: Callable[[], object], *, held_out: bool = False) -> Plant:
    def plant(trainer: Trainer) -> None:
        honest, main = Dialogues.__getitem__, os.getpid()

        def getitem(self, index):
            if index in numbers and os.getpid() != main and (self is trainer.eval_dataset) == held_out:
                how()
            return honest(self, index)

        Dialogues.__getitem__ = getitem

    return plant


def left_behind(bench: Bench) -> Verdict:
    """Whether workers outlive a trainer that is killed, and how long."""
    told = bench.fresh() / "pids"

    def tell_and_die(trainer: Trainer) -> None:
        told.write_text(" ".join(map(str, worker_pids())))
        kill()

    seen = bench.train(at_step(3, tell_and_die), dataloader_num_workers=3)
    pids = [int(pid) for pid in told.read_text().split()]
    began = time.monotonic()
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() - began < 30:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - began
    text = (
        f"{len(left)} of {len(pids)} are still there after 30 s"
        if left
        else f"all {len(pids)} end within {seconds:.0f} s"
    )
    return Verdict(SILENT if left else HARMLESS, text, seen.facts)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Two at once, and time.


def second_trainer(bench: Bench) -> Verdict:
    """Another one, of other data, begins in the folder after step 3 of the first, and runs to its end."""
    folder = bench.fresh() / "run"
    other = write_dialogues(bench.fresh() / "data", change=lambda record: record["messages"][1].update(content="high"))
    told = bench.fresh() / "second"

    def start(trainer: Trainer) -> None:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        code = in_child(lambda: bench.script.trainer(folder, other).train())
        changed = {path.parent.name for path, at in before.items() if path.is_file() and path.stat().st_mtime_ns != at}
        told.write_text(f"{code} {' '.join(sorted(changed))}")

    seen = bench.train(at_step(3, start), folder=folder)
    code, *changed = told.read_text().split()
    if int(code) != 0:
        return Verdict(HARMLESS, "the second one ends with an error", seen.facts)
    kind = SILENT if changed else HARMLESS
    return Verdict(
        kind,
        f"both finish, say nothing; the second one wrote over {', '.join(changed) or 'nothing'} of the first",
        seen.facts,
    )


def clock_jumps(bench: Bench) -> Verdict:
    """As the test: time.time jumps by a year after each step, and the folders' times with it."""
    year, honest = 365 * 86_400, time.time
    folder = bench.fresh() / "run"

    class Jumps(TrainerCallback):
        jump = 0

        def on_step_end(self, args, state, control, **kwargs):
            Jumps.jump = -year if Jumps.jump >= 0 else year
            for age, step in enumerate(sorted(checkpoint_folders(folder))):
                os.utime(folder / f"checkpoint-{step}", (honest() - Jumps.jump - 1000 * age,) * 2)

    def plant(trainer: Trainer) -> None:
        time.time = lambda: honest() + Jumps.jump

    seen = bench.train(plant, folder=folder, callbacks=[Jumps()], save_steps=1, save_total_limit=2)
    if not seen.finished:
        return judge(bench.clean(), seen)
    left = sorted(seen.checkpoints, key=lambda name: int(name.split("-")[1]))
    newest = f"checkpoint-{STEPS}" in left and f"checkpoint-{STEPS - 1}" in left
    seconds = next(log["train_runtime"] for log in seen.logs if "train_runtime" in log)
    text = (
        f"finishes with the weights that it should have; {', '.join(left)} are kept"
        if same_weights(bench.clean(), seen)
        else f"finishes in other weights; {', '.join(left)} are kept"
    )
    text += f", and it reports {seconds:.0f} s of training" if seconds < 0 or seconds > year / 2 else ""
    return Verdict(HARMLESS if newest and same_weights(bench.clean(), seen) else SILENT, text, seen.facts)


CASES = {
    "SIGKILL while a resumed run writes its config.yaml": lambda bench: no_such_part(
        "it writes no file of its settings that a resume is started from"
    ),
    "SIGKILL in a step": partial(killed_then_resumed, plant=kill_in_step),
    "SIGKILL twenty times, at random moments and inside saves": twenty_kills,
    "SIGTERM in the middle of an evaluation": terminate_in_evaluation,
    "a signal in the middle of the last evaluation": terminate_in_evaluation,
    "a held-out clip that kills the process that reads it": lambda bench: with_workers(
        bench, kills_reader({5}, kill, held_out=True), eval_file=bench.train_file
    ),
    "SIGINT while waiting for data that does not come": interrupt_while_waiting,
    "a second signal in the middle of the save that the first one asked for": partial(
        signalled, plant=at_step(2, terminate)
    ),
    "a process that reads data is killed": partial(with_workers, plant=to_workers(signal.SIGKILL, all_of_them=False)),
    "a sample whose reading kills the process, every time": partial(with_workers, plant=kills_reader({5, 6}, kill)),
    "a sample whose reading never ends: a decoder in a loop, a dead network drive": partial(
        with_workers, plant=kills_reader({5, 6}, signal.pause)
    ),
    "processes that read data die again and again, whatever they read": partial(
        with_workers, plant=kills_reader(set(range(8)), lambda: os._exit(3))
    ),
    "Ctrl-C, which the terminal sends to every process": partial(
        with_workers, plant=to_workers(signal.SIGINT, all_of_them=True)
    ),
    "SIGKILL of a trainer that has processes reading data": left_behind,
    "a second trainer in the same folder": second_trainer,
    "the clock jumps, back by a year and ahead by a year": clock_jumps,
    "SIGKILL in an evaluation": lambda bench: killed_then_resumed(
        bench, kill_in_evaluation, eval_file=bench.train_file
    ),
}
