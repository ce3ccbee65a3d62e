"""How far a spike of the gradient moves the weights, with the guards and with a plain clip of all gradients to 1.

    python benchmarks/spikes.py --demo_dir demo-output --output_dir DIR --seeds 0 1 2

The demo's models train as in chaos.py. At some steps the run branches: after one backward pass the gradients of all
groups, or of one, are multiplied by 10 to 1e12, and eight steps follow; one branch has no spike. A plain branch does
what Hugging Face's Trainer does with gradients, from the same weights and moments. The measure of each group is an
update's norm divided by its learning rate, against the median of the 50 updates before (fewer at a group's start).
A group has recovered when its updates are within the range of those 50 and of the branch without a spike, a tenth more
either way. Ends with exit code 1 if with the guards an update is above three medians, or a group needs more than 5
steps to recover.
"""

import argparse
import copy
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from chaos import arguments
from common import append_result

from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.loader import StepSamples, step_samples
from qwhisper.guards.gradients import drop_gradients, gradients
from qwhisper.guards.snapshot import Snapshots
from qwhisper.train.loop import train_step
from qwhisper.train.models import build_model
from qwhisper.train.plan import resolve
from qwhisper.train.recovery import num_supervised
from qwhisper.train.session import Session, build_session
from qwhisper.train.state import TrainState

ALL = "all"
MEDIAN_OF, FEWEST = 50, 5
AFTER = 8
MARGIN = 1.1
LARGEST, SLOWEST = 3.0, 5  # what is promised: medians, steps
Norms = dict[str, list[float]]  # of each group's updates so far, over its learning rate


class Branches:
    """One run that can continue from the same point many times."""

    def __init__(self, run: Session):
        self.run, self.norms, self.factors = run, {}, {}
        run.optimizer.register_step_pre_hook(lambda *_: self._before())
        run.optimizer.register_step_post_hook(lambda *_: self._after())
        self._honest = run.executor.forward_backward
        run.executor.forward_backward = self._spiked  # type: ignore[method-assign]

    def keep(self) -> None:
        """Save the point to branch at."""
        self._snapshots = Snapshots(self.run.groups, self.run.optimizer)
        assert self._snapshots.take(self.run.state.step)
        self._kept = copy.deepcopy((self.run.state.step, self.run.state.guards, self.norms))

    def branch(self, step: Callable, following: list[StepSamples], factors: dict[str, float]) -> Norms:
        """Norms of all updates up to the end of a branch; factors: on the gradients of its first step, by group."""
        self._snapshots.restore()
        self.run.state.step, self.run.state.guards, self.norms = copy.deepcopy(self._kept)
        self.run.set_learning_rates()
        self.factors = factors
        for fetched in following:
            step(self.run, fetched)
            self.factors = {}
        return self.norms

    def _spiked(self, samples, count):
        result = self._honest(samples, count)
        for name, factor in self.factors.items():
            torch._foreach_mul_(gradients(self.run.groups[name]), factor)
        return result

    def _before(self) -> None:
        self._weights = {name: [p.detach().clone() for p in group] for name, group in self.run.groups.items()}

    def _after(self) -> None:
        for group in self.run.optimizer.param_groups:
            name = group["name"]
            moved = torch._foreach_sub([p.detach() for p in self.run.groups[name]], self._weights[name])
            if (norm := math.hypot(*map(float, torch._foreach_norm(moved)))) > 0:
                self.norms.setdefault(name, []).append(norm / group["lr"])


def plain_step(run: Session, fetched: StepSamples) -> None:
    frozen = run.frozen_groups
    run.executor.forward_backward(fetched.samples, num_supervised(fetched.samples))
    drop_gradients({name: parameters for name, parameters in run.groups.items() if name in frozen})
    torch.nn.utils.clip_grad_norm_([p for group in run.groups.values() for p in group], run.args.max_grad_norm)
    run.optimizer.step()
    drop_gradients(run.groups)
    run.scheduler.step()
    run.state.step += 1


def ratios(norms: list[float]) -> list[float]:
    """The ratio of each update but the first ones to the median of those before it."""
    medians = (statistics.median(norms[max(0, i - MEDIAN_OF) : i]) for i in range(FEWEST, len(norms)))
    return [norm / median for norm, median in zip(norms[FEWEST:], medians, strict=True)]


def judge(norms: list[float], without_spike: list[float]) -> dict[str, float]:
    """For one group: the largest and smallest update from the spike on, and steps until all have a usual size again."""
    after, usual = ratios(norms)[-AFTER:], ratios(without_spike)[-AFTER - MEDIAN_OF :]
    low, high = min(usual) / MARGIN, max(usual) * MARGIN
    recovered = 1 + max((index for index, ratio in enumerate(after) if not low <= ratio <= high), default=-1)
    return {"largest": max(after), "smallest": min(after), "recovered": recovered, "usual": max(usual)}


def begin(args: argparse.Namespace, seed: int) -> tuple[Session, Iterator[StepSamples]]:
    train_args = arguments(args, args.demo_dir / "train.jsonl", args.output_dir / str(seed), seed)
    Path(train_args.output_dir).mkdir(parents=True)
    torch.manual_seed(seed)
    dialogues = read_dialogues(train_args.train_file, data_root="/")
    plan = resolve(train_args, num_dialogues=len(dialogues))
    model, processor = build_model(train_args, plan, None)
    run = build_session(train_args, plan, model, processor, dialogues, [], TrainState(), [])
    model.train()
    return run, step_samples(run.source, run.encoder)


def try_seed(args: argparse.Namespace, seed: int) -> Iterator[dict]:
    """One result for each point, factor, target and kind of step."""
    run, steps = begin(args, seed)
    branches = Branches(run)
    for point in args.points:
        while run.state.step < point:
            train_step(run, next(steps))
        branches.keep()
        following = list(itertools.islice(steps, AFTER))
        for name, step in (("guards", train_step), ("plain clip", plain_step)):
            calm = branches.branch(step, following, {})
            for target, factor in itertools.product([ALL, *run.groups], args.factors):
                norms = branches.branch(
                    step, following, dict.fromkeys(run.groups if target == ALL else [target], factor)
                )
                for group in norms:
                    if len(norms[group]) > AFTER + FEWEST:
                        record = {"seed": seed, "step": point, "target": target, "factor": factor, "group": group}
                        yield {"name": name} | record | judge(norms[group], calm[group])
        branches.branch(train_step, following, {})  # then continue from there


def summary(found: list[dict]) -> dict:
    worst = max(found, key=lambda case: case["largest"])
    return {
        "cases": len(found),
        "largest_update_in_medians": round(worst["largest"], 3),
        "where": {key: worst[key] for key in ("seed", "step", "target", "factor", "group")},
        "smallest_update_in_medians": round(min(case["smallest"] for case in found), 4),
        "largest_without_spike": round(max(case["usual"] for case in found), 3),
        "above_three_medians": sum(case["largest"] > LARGEST for case in found),
        "slowest_recovery_steps": max(case["recovered"] for case in found),
        "not_recovered_in_five_steps": sum(case["recovered"] > SLOWEST for case in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, required=True, help="output folder of `qwhisper demo`")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1000, help="length of the schedule")
    parser.add_argument("--points", type=int, nargs="+", default=[27, 130, 700], help="steps in which spikes come")
    parser.add_argument("--factors", type=float, nargs="+", default=[10.0**power for power in (1, 2, 3, 6, 9, 12)])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.demo_dir, args.output_dir = args.demo_dir.resolve(), args.output_dir.resolve()
    sound = True
    for seed in args.seeds:
        found = list(try_seed(args, seed))
        for name, point in itertools.product(("guards", "plain clip"), args.points):
            cases = [case for case in found if (case["name"], case["step"]) == (name, point)]
            result = summary(cases)
            append_result("spikes", {"name": name, "seed": seed, "step": point} | result)
            bad = result["above_three_medians"] or result["not_recovered_in_five_steps"]
            sound = sound and not (name == "guards" and bad)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
