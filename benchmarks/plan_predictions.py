"""Peaks that the planner predicts for cases of throughput.py.

    python benchmarks/plan_predictions.py [--execution captured] [--case 14b-nf4]

One JSON line a case in benchmarks/results/plan_predictions.jsonl, written before the case is measured. Samples, steps
and budget are those of the case; packs and layers computed again are what `train` would choose with them on an H200.
"""

import argparse
from dataclasses import dataclass

from common import append_result
from throughput_cases import CASES as MEASURED
from throughput_meter import PROFILED_STEPS

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_choice import choose
from qwhisper.engine.plan_memory import GIB, Execution, Job, Weights
from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES
from qwhisper.engine.plan_speed import CARDS, samples_a_second
from qwhisper.train.fit import MARGIN

H200 = next(card for card in CARDS if card.name == "H200")


@dataclass(frozen=True)
class Case:
    """What a plan needs to know beside the case of the same name in throughput_cases.py."""

    weights: Weights = "bf16"
    use_lora: bool = True
    distils: bool = False


CASES = {
    "0.6b": Case(),
    "0.6b-1x4": Case(),
    "8b-bf16": Case(),
    "8b-bf16-1x4": Case(),
    "8b-fp8": Case("fp8"),
    "0.6b-distill": Case(use_lora=False, distils=True),
    "0.6b-no-distill": Case(use_lora=False),
    "8b-distill": Case(use_lora=False, distils=True),
    "8b-nf4": Case("nf4"),
    "14b-nf4": Case("nf4"),
    "32b-nf4": Case("nf4"),
    "4b": Case(),
}


def predict(name: str, execution: Execution) -> dict:
    case, measured = CASES[name], MEASURED[name]
    job = Job(
        text=TEXT_SIZES[f"qwen3-{measured.size}"],
        audio=AUDIO_SIZES["whisper-large-v3-turbo"],
        weights=case.weights,
        lora_r=16 if case.use_lora else 0,
        distils=case.distils,
        execution=execution,
    )
    steps = measured.steps + PROFILED_STEPS
    rows = Rows()  # of real_shapes.py's data, by the same seeds
    choice = choose(job, rows, measured.samples, int(MARGIN * measured.most_gib * GIB), H200, steps=steps)
    fast = samples_a_second(job, rows, choice.tokens, choice.recompute_layers, H200, measured.samples)
    return {
        "max_reserved_gib": round(choice.memory.reserved / GIB, 2),
        "max_tokens_per_pack": choice.max_tokens_per_pack,
        "largest_pack": choice.tokens,
        "recompute_layers": choice.recompute_layers,
        "samples_s": round(fast, 1),
        "parts_gib": {name: round(size / GIB, 2) for name, size in choice.memory.parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--execution", choices=("plain", "compiled", "captured"), default="plain")
    parser.add_argument("--case", choices=CASES, help="default: all of them")
    args = parser.parse_args()
    for name in CASES:
        if args.case in (None, name):
            found = {"case": name, "execution": args.execution, **predict(name, args.execution)}
            append_result("plan_predictions", found)


if __name__ == "__main__":
    main()
