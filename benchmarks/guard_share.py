"""The share of a run's time that guards, log, probe and checkpoints take at their defaults, captured steps included.

    python benchmarks/guard_share.py --tokenizer DIR --output_dir DIR --case 0.6b

One `qwhisper train` of a case of throughput.py. Blocks of steps run in turns as they are and bare: forward, backward,
`clip_grad_norm_`, optimizer, schedule, and one wait for the loss. share_steps compares the means of both, so that work
which is not done in every step counts (snapshots, checksums, the probe); error: its standard error over the pairs of
blocks. share_saves: the seconds of a checkpoint divided by those of --save_steps bare steps. guard_cost.py has the
parts.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import append_result
from real_shapes import make_bases, make_data
from throughput import CASES, MOST_CLIPS, execution_of, flags_of
from transformers import TrainerCallback

from qwhisper.commands import VERBS
from qwhisper.data.loader import StepSamples
from qwhisper.guards.gradients import drop_gradients
from qwhisper.parsing import parse
from qwhisper.train import loop
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.recovery import num_supervised
from qwhisper.train.run import main as train
from qwhisper.train.session import Session, StepReport


class Blocks(TrainerCallback):
    """Whether the present step is bare, and the seconds of each block: `warm` steps, then bare and full ones in turns.

    A step ends where the next one begins. Checkpoints are timed apart.
    """

    def __init__(self, warm: int, length: int):
        self.warm, self.length, self.step, self.bare = warm, length, 0, False
        self.begun: float | None = None
        self.seconds: list[float] = []  # of a step, mean of each finished block, beginning with a bare one
        self.saves: list[float] = []
        self.spent_on_saves = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        past = self.step - self.warm
        if past >= 0 and past % self.length == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.begun is not None:
                self.seconds.append((now - self.begun - self.spent_on_saves) / self.length)
            self.begun, self.spent_on_saves = now, 0.0
            self.bare = past // self.length % 2 == 0
        elif past < 0:
            self.bare = self.step % 2 == 0  # so that both kinds have run before the clock starts
        self.step += 1

    def timed_save(self, save: Callable[..., bool]) -> Callable[..., bool]:
        def timed(*args: Any, **kwargs: Any) -> bool:
            begun = time.perf_counter()
            saved = save(*args, **kwargs)
            self.saves.append(time.perf_counter() - begun)
            self.spent_on_saves += self.saves[-1]
            return saved

        return timed


def bare_step(session: Session, fetched: StepSamples) -> StepReport:
    """A step as a plain loop takes it."""
    samples = fetched.samples
    if session.features is not None:
        session.features.complete(samples)
    tokens = num_supervised(samples)
    loss = session.executor.forward_backward(samples, tokens).loss
    parameters = [p for group in session.groups.values() for p in group]
    torch.nn.utils.clip_grad_norm_(parameters, session.args.max_grad_norm)
    session.optimizer.step()
    drop_gradients(session.groups)
    session.scheduler.step()
    session.state.step += 1
    session.state.position = fetched.position
    session.state.supervised_tokens += tokens
    return StepReport(
        loss=float(loss), tokens=tokens, grad_norm=0.0, skipped=None, group_norms={}, peaks={},
        num_samples=len(samples), has_audio=True, frozen=frozenset(),
    )  # fmt: skip


@contextlib.contextmanager
def in_turns(blocks: Blocks) -> Iterator[None]:
    """Within it, `loop` takes bare steps in bare blocks, with none of the work around them."""
    instead: dict[str, Callable[..., Any]] = {
        "train_step": bare_step,
        "as_before_step": lambda session: lambda: None,
        "watch": lambda *args, **kwargs: None,
        "log_step": lambda *args: None,
        "log_window": lambda *args: None,
    }
    own = {name: getattr(loop, name) for name in (*instead, "try_to_save")}

    def chosen(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: (instead if blocks.bare else own)[name](*args, **kwargs)

    for name in instead:
        setattr(loop, name, chosen(name))
    loop.try_to_save = blocks.timed_save(own["try_to_save"])
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(loop, name, function)


def shares(blocks: Blocks, save_steps: int) -> dict[str, float]:
    bare, full = blocks.seconds[0::2], blocks.seconds[1::2]
    each = [with_all / without - 1 for without, with_all in zip(bare, full, strict=True)]
    bare_s, save_s = statistics.mean(bare), statistics.mean(blocks.saves)
    found = {"bare_step_s": bare_s, "step_s": statistics.mean(full), "share_steps": statistics.mean(each)}
    found["error"] = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")
    found |= {"save_s": save_s, "save_steps": save_steps, "share_saves": save_s / (save_steps * bare_s)}
    found["share"] = found["share_steps"] + found["share_saves"]
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--warm", type=int, default=8, help="steps before the clock starts")
    parser.add_argument("--block", type=int, default=20, help="steps of a block")
    parser.add_argument("--pairs", type=int, default=4, help="of a bare and a full block")
    args = parser.parse_args()
    case = CASES[args.case]
    folder = args.output_dir.resolve()
    bases = make_bases(folder / "bases", case.size, args.tokenizer, nf4=case.nf4_base)
    steps = args.warm + 2 * args.block * args.pairs + 1  # the last one ends the last block
    count = min(MOST_CLIPS, steps * case.samples)
    data = make_data(folder / "data", count, longest_s=case.longest_s, most_turns=case.most_turns)
    run = folder / f"run-share-{args.case}-{time.strftime('%H%M%S')}"
    more = ["--output_dir", str(run), "--max_steps", str(steps), "--freeze_projector_steps", "0"]
    settings = parse("train", VERBS["train"], TrainArguments, flags_of(case, folder, bases, data, more))
    blocks = Blocks(args.warm, args.block)
    with in_turns(blocks):
        code = train(settings, [blocks])
    assert code == 0, f"the training ended with exit code {code}"
    facts = {"name": "share of a run", "case": args.case, "block": args.block, "pairs": args.pairs}
    append_result("guard_cost", facts | execution_of(run) | shares(blocks, settings.save_steps))


if __name__ == "__main__":
    main()
