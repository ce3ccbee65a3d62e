"""A soak: training on the demo's models with about one percent of random faults, against the same run without.

    python benchmarks/chaos.py --demo_dir demo-output --output_dir DIR --steps 10000 --seeds 0 1 2

Numerical faults (NaN, infinite and 1e30 losses and gradients of single samples, peaks of ×10 to ×1e12) are planted
behind the backward pass, data faults (random bytes, truncated, NaN samples, silence) into the clips. --demo_dir is the
output folder of `qwhisper demo`. Ends with exit code 1 unless nothing crashed, every parameter is finite, the ids
logged are those injected, and the held-out loss is within one percent of the fault-free run's, averaged over the seeds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
from common import ROOT, append_result

sys.path.insert(0, str(ROOT))
from qwhisper.demo.bases import LEAD_SILENCE_S, TAIL_SILENCE_S
from qwhisper.report.events import read_jsonl
from qwhisper.train.arguments import TrainArguments
from tests.test_faults.inject import Outcome, RandomFaults, outcome_of, spoil_clips


def arguments(args: argparse.Namespace, train_file: Path, output_dir: Path, seed: int) -> TrainArguments:
    demo = args.demo_dir
    return TrainArguments(
        train_file=str(train_file),
        eval_file=str(demo / "eval.jsonl"),
        data_root="/",
        output_dir=str(output_dir),
        audio_model=str(demo / "whisper-base"),
        text_model=str(demo / "qwen3-base"),
        audio_lead_silence=LEAD_SILENCE_S,
        audio_tail_silence=TAIL_SILENCE_S,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        max_steps=args.steps,
        save_steps=max(1, args.steps // 5),
        logging_steps=max(1, args.steps // 20),
        max_bad_fraction=0.1,
        freeze_projector_steps=0,  # a fault in a frozen group's gradient is dropped with it, unseen
        seed=seed,
    )


def held_out_loss(folder: Path) -> float:
    return [line["eval_loss"] for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line][-1]


def with_faults(args: argparse.Namespace, seed: int, folder: Path) -> tuple[Outcome, RandomFaults, set[str]]:
    faults = RandomFaults(share=args.share, seed=seed)
    spoiled = spoil_clips(args.demo_dir / "train.jsonl", folder / "data/train.jsonl", args.share, seed)
    with pytest.MonkeyPatch.context() as patch:
        faults.plant(patch)
        outcome = outcome_of(arguments(args, folder / "data/train.jsonl", folder / "run", seed))
    return outcome, faults, spoiled


def soak(args: argparse.Namespace, seed: int) -> dict:
    """One seed with and without faults."""
    clean_folder, folder = args.output_dir / f"clean-{seed}", args.output_dir / f"faults-{seed}"
    began = time.perf_counter()
    clean = outcome_of(arguments(args, args.demo_dir / "train.jsonl", clean_folder, seed))
    clean_seconds, began = time.perf_counter() - began, time.perf_counter()
    outcome, faults, spoiled = with_faults(args, seed, folder)
    quarantined = {line["id"] for line in read_jsonl(folder / "run/quarantine.jsonl")}
    losses = (held_out_loss(clean_folder), held_out_loss(folder / "run"))
    return {
        "seed": seed,
        "steps": args.steps,
        "crashes": sum(run.code != 0 for run in (clean, outcome)),
        "finite": outcome.finite,
        "samples_injected": len(faults.samples),
        "samples_missed": len(faults.samples - outcome.dropped),
        "samples_wrongly_dropped": len(outcome.dropped - faults.samples),
        "clips_injected": len(spoiled),
        "clips_quarantined_rightly": quarantined <= spoiled,
        "peaks_injected": len(faults.peaks),
        "rewinds": outcome.count("rewind"),
        "false_alarms": len(clean.events),
        "loss_clean": round(losses[0], 5),
        "loss_with_faults": round(losses[1], 5),
        "seconds_clean": round(clean_seconds, 1),
        "seconds_with_faults": round(time.perf_counter() - began, 1),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, required=True, help="output folder of `qwhisper demo`")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--share", type=float, default=0.01, help="of sample visits, steps and clips that are hit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.demo_dir, args.output_dir = args.demo_dir.resolve(), args.output_dir.resolve()
    results = []
    for seed in args.seeds:
        results.append(soak(args, seed))
        append_result("chaos", results[-1])
    differences = [result["loss_with_faults"] / result["loss_clean"] - 1 for result in results]
    mean = sum(differences) / len(differences)
    print(f"held-out loss with faults: {mean:+.2%} on average, {json.dumps([f'{d:+.2%}' for d in differences])}")
    sound = all(
        not r["crashes"] and r["finite"] and not r["samples_missed"] and not r["samples_wrongly_dropped"]
        and r["clips_quarantined_rightly"] and not r["false_alarms"]
        for r in results
    )  # fmt: skip
    return 0 if sound and abs(mean) <= 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
