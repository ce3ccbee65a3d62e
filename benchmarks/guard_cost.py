"""What the guards cost: a guarded training step against the same step with a plain clip, and the periodic work.

    python benchmarks/guard_cost.py --audio_model DIR --text_model DIR --train_file FILE --output_dir DIR
    python benchmarks/guard_cost.py --tokenizer DIR --size 1.7b --output_dir DIR --batch 16

The first with any bases; without --train_file on clips of noise. The second with random weights of real shapes
(real_shapes.py). Both kinds of step run on the same model and samples in turns. A plain step is forward, backward,
`clip_grad_norm_`, a check of the loss, optimizer, schedule; a guarded one is the product's `train_step` and `watch`.
Work that is not done in every step (checksums, snapshots, the listening probe, the kernels' trial) is timed separately;
its share is that of a run which does it as often as the product. On a GPU, waits for the device are counted by the
warnings of `torch.cuda.set_sync_debug_mode`.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from common import append_result
from real_shapes import SIZES, make_bases, make_data

from qwhisper.checksums import checksums
from qwhisper.data.dialogue import read_dialogues
from qwhisper.data.loader import StepSamples, encode_all
from qwhisper.data.rows import Sample
from qwhisper.data.source import epoch_position
from qwhisper.engine.kernels import check_kernels
from qwhisper.guards.alarms import WEIGHTS_EVERY
from qwhisper.guards.decide import decide
from qwhisper.guards.gradients import (
    drop_gradients,
    frozen_parameters,
    group_checksums,
    scale_gradients,
    step_statistics,
)
from qwhisper.guards.state import SNAPSHOT_STEPS
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.loop import train_step
from qwhisper.train.models import build_model
from qwhisper.train.monitor import watch
from qwhisper.train.plan import resolve
from qwhisper.train.probe import TIME_SHARE
from qwhisper.train.recovery import num_supervised
from qwhisper.train.session import Session, build_session, encoder_for
from qwhisper.train.signals import StopSignals
from qwhisper.train.state import TrainState

WARM_UP = 5  # pairs of steps
REPEATS = 5


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(act: Callable[[], object]) -> float:
    wait_for_device()
    began = time.perf_counter()
    act()
    wait_for_device()
    return time.perf_counter() - began


def median_of(act: Callable[[], object]) -> float:
    return statistics.median(seconds_of(act) for _ in range(REPEATS))


def plain_step(run: Session, samples: Sequence[Sample]) -> None:
    loss = run.executor.forward_backward(samples, num_supervised(list(samples))).loss
    torch.nn.utils.clip_grad_norm_([p for group in run.groups.values() for p in group], run.args.max_grad_norm)
    run.optimizer.step()
    drop_gradients(run.groups)
    run.scheduler.step()
    float(loss)


def guarded_step(run: Session, samples: Sequence[Sample]) -> None:
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    report = train_step(run, StepSamples(list(samples), [], epoch_position(1, 0)))
    watch(run, report, rates, StopSignals(), save_is_due=False)


def compare_steps(run: Session, rows: list[list[Sample]], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of plain and of guarded steps on the same samples, each kind first in every other pair.

    Work that is not done in every step is left out: probe, checksums and snapshots.
    """
    run.probe = None
    run.state.alarms.wants_weights = lambda step: False  # type: ignore[method-assign]
    kinds: list[Callable] = [plain_step, guarded_step]
    seconds: dict[Callable, list[float]] = {kind: [] for kind in kinds}
    for pair in range(pairs):
        run.state.guards.clean_steps = 0
        for kind in kinds[:: 1 if pair % 2 else -1]:
            seconds[kind].append(seconds_of(partial(kind, run, rows[pair % len(rows)])))
    del run.state.alarms.wants_weights
    return tuple(seconds[kind][WARM_UP:] for kind in kinds)  # type: ignore[return-value]


def waits_for_device(act: Callable[[], object]) -> int | None:
    """None on a CPU, which has nothing to wait for."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def parts_of_a_step(run: Session, samples: list[Sample]) -> dict[str, float]:
    """Seconds of the guards' work in each step, on gradients that exist already."""
    args, averages = run.args, run.state.guards.averages
    loss = run.executor.forward_backward(samples, num_supervised(samples)).loss
    found = step_statistics(loss, run.groups)

    def judge() -> None:
        decide(found, averages, group_bounds={"lora": args.lora_grad_clip}, max_grad_norm=args.max_grad_norm)

    decision = decide(found, {}, group_bounds={}, max_grad_norm=found.gradients["lora"] / 2)
    parts = {
        "plain_clip": median_of(lambda: torch.nn.utils.clip_grad_norm_(list(run.executor.model.parameters()), 1e9)),
        "measure": median_of(lambda: step_statistics(loss, run.groups)),
        "decide": median_of(judge),
        "apply": median_of(lambda: scale_gradients(decision, run.groups)),
    }
    drop_gradients(run.groups)
    return parts


def now_and_then(run: Session, step: float) -> dict[str, dict[str, float]]:
    """Seconds of each act that is not part of every step; share: of the training time, at its usual interval."""
    gigabytes = sum(t.numel() * t.element_size() for _, t in frozen_parameters(run.executor.model)) / 1e9
    longest = run.args.max_length or run.executor.max_tokens_per_pack
    first_trial = seconds_of(lambda: check_kernels(run.executor.model, longest))
    kernels = {"seconds": first_trial, "seconds_again": seconds_of(lambda: check_kernels(run.executor.model, longest))}
    base = {"seconds": median_of(lambda: checksums(frozen_parameters(run.executor.model))), "gigabytes": gigabytes}
    groups = {"seconds": median_of(lambda: group_checksums(run.groups)), "every_steps": WEIGHTS_EVERY}
    snapshot = {"seconds": median_of(lambda: run.snapshots.take(0)), "every_steps": SNAPSHOT_STEPS}
    acts = {"check_kernels": kernels, "base_fingerprint": base, "group_checksums": groups, "snapshot": snapshot}
    if run.probe is not None:
        run.probe.measure()
        probe = median_of(run.probe.measure)
        acts["listening_probe"] = {"seconds": probe, "every_steps": max(1.0, probe / TIME_SHARE / step)}
    for act in acts.values():
        if "every_steps" in act:
            act["share"] = act["seconds"] / act["every_steps"] / step
    return acts


def make_session(args: argparse.Namespace) -> tuple[Session, list[list[Sample]]]:
    if args.tokenizer:
        args.audio_model, args.text_model = make_bases(args.output_dir, args.size, args.tokenizer)
    train_file = args.train_file or make_data(args.output_dir / "data", args.batch * args.rows)
    settings = TrainArguments(
        train_file=str(train_file.resolve()), data_root="/", output_dir=str(args.output_dir / "run"),
        audio_model=str(args.audio_model), text_model=str(args.text_model), dtype=args.dtype,
        load_in_4bit=args.load_in_4bit, per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
        freeze_projector_steps=0, max_steps=1_000_000,
    )  # fmt: skip
    (args.output_dir / "run").mkdir(parents=True)
    torch.manual_seed(0)
    dialogues = read_dialogues(settings.train_file, data_root="/", max_samples=max(64, args.batch * args.rows))
    plan = resolve(settings, num_dialogues=len(dialogues))
    model, processor = build_model(settings, plan, None)
    run = build_session(settings, plan, model, processor, dialogues, [], TrainState(), [])
    model.train()
    samples, _ = encode_all(dialogues[: args.batch * args.rows], encoder_for(settings, processor, model))
    return run, [samples[start : start + args.batch] for start in range(0, len(samples), args.batch)]


def rounded(values: dict) -> dict:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--text_model", type=Path, default=None)
    parser.add_argument("--audio_model", type=Path, default=None)
    parser.add_argument("--tokenizer", type=Path, default=None, help="makes bases of random weights")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of those bases")
    parser.add_argument("--train_file", type=Path, default=None, help="default: clips of noise")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="batches, used in turn")
    parser.add_argument("--pairs", type=int, default=100, help="of a plain and a guarded step")
    args = parser.parse_args()
    if not args.tokenizer and not (args.text_model and args.audio_model):
        parser.error("give --text_model and --audio_model, or --tokenizer and --size")
    return args


def main() -> None:
    args = parse()
    run, rows = make_session(args)
    facts = {
        "text_model": args.text_model.name, "audio_model": args.audio_model.name,
        "dtype": str(run.executor.model.dtype).removeprefix("torch."),
        "load_in_4bit": args.load_in_4bit, "batch": args.batch,
        "tokens_a_step": round(sum(len(s.input_ids) for row in rows for s in row) / len(rows)),
        "trained_parameters": sum(p.numel() for group in run.groups.values() for p in group),
        "trained_tensors": sum(map(len, run.groups.values())),
    }  # fmt: skip
    probe = run.probe
    plain, guarded = compare_steps(run, rows, WARM_UP + args.pairs)
    more = [with_guards - without for without, with_guards in zip(plain, guarded, strict=True)]
    step = statistics.median(plain)
    spread = statistics.quantiles(more, n=4)
    waits = {"plain": waits_for_device(lambda: plain_step(run, rows[0]))}
    waits["guarded"] = waits_for_device(lambda: guarded_step(run, rows[0]))
    steps = {"plain_seconds": step, "guarded_seconds": statistics.median(guarded)}
    steps |= {"more_seconds": spread[1], "more_quartile_1": spread[0], "more_quartile_3": spread[2]}
    steps |= {"share": spread[1] / step}
    append_result("guard_cost", {"name": "step"} | facts | {"pairs": args.pairs} | rounded(steps) | {"waits": waits})
    append_result("guard_cost", {"name": "parts of a step, seconds"} | facts | rounded(parts_of_a_step(run, rows[0])))
    run.probe = probe
    acts = now_and_then(run, step)
    for name, act in acts.items():
        append_result("guard_cost", {"name": name} | facts | rounded(act))
    shares = {name: act["share"] for name, act in acts.items() if "share" in act and name != "listening_probe"}
    total = rounded({"share": steps["share"] + sum(shares.values())})
    append_result("guard_cost", {"name": "step, checksums and snapshots together"} | facts | total)


if __name__ == "__main__":
    main()
