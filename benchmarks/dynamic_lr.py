"""`--dynamic_lr` on training that spikes without planted faults, at too high a learning rate: with it and without.

    python benchmarks/dynamic_lr.py --demo_dir demo-output --output_dir DIR --learning_rate 0.004 --seeds 0 1 2

The demo's models train as in chaos.py. The script counts the steps with a peak (a group above three running averages of
its gradient norm), the steps whose loss is above three medians of the 50 before, and the spikes and rewinds that the
guards report; it compares the held-out loss at the end.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

from chaos import arguments, held_out_loss
from common import append_result

from qwhisper.errors import NothingLearnedError
from qwhisper.report.events import read_jsonl
from qwhisper.train.run import main as train

HIGH, MEDIAN_OF = 3.0, 50  # medians; steps


def run(args: argparse.Namespace, seed: int, dynamic: bool) -> dict:
    folder = args.output_dir / f"{'dynamic' if dynamic else 'plain'}-{args.learning_rate:g}-{seed}"
    train_args = arguments(args, args.demo_dir / "train.jsonl", folder, seed)
    try:
        code = train(dataclasses.replace(train_args, dynamic_lr=dynamic, lr_scheduler_type=args.schedule))
    except NothingLearnedError as error:  # expected at the rates that are compared here
        code = error.exit_code
    steps = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    events = read_jsonl(folder / "events.jsonl")
    factors = [event["dynamic_factor"] for event in events if event["kind"] == "learning_rate"]
    return {
        "dynamic_lr": dynamic,
        "seed": seed,
        "exit_code": code,
        "steps_with_a_peak": sum("peak_lora" in line or "peak_projector" in line for line in steps),
        "steps_of_high_loss": len(high_losses([float(line["loss"]) for line in steps])),
        "spikes": sum(event["kind"] == "gradient_spike" for event in events),
        "rewinds": sum(event["kind"] == "rewind" for event in events),
        "loss": round(held_out_loss(folder), 5),
        "lowest_factor": round(min(factors, default=1.0), 3),
        "last_factor": round(factors[-1] if factors else 1.0, 3),
    }


def high_losses(losses: list[float]) -> list[int]:
    """Steps whose loss is far above those before."""
    medians = {i: statistics.median(losses[i - MEDIAN_OF : i]) for i in range(MEDIAN_OF, len(losses))}
    return [i for i, median in medians.items() if losses[i] > HIGH * median]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, required=True, help="output folder of `qwhisper demo`")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.demo_dir, args.output_dir = args.demo_dir.resolve(), args.output_dir.resolve()
    settings = {key: getattr(args, key) for key in ("steps", "batch", "learning_rate", "schedule")}
    for seed in args.seeds:
        for dynamic in (False, True):
            append_result("dynamic_lr", run(args, seed, dynamic) | settings)


if __name__ == "__main__":
    main()
