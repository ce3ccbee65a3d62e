"""Peaks that the planner predicts for the cases of throughput.py and for two that nobody has measured yet.

    python benchmarks/plan_predictions.py [--execution captured] [--case 14b-nf4]

One JSON line a case in benchmarks/results/plan_predictions.jsonl, written before the case is measured. The budget is
that of the case on a card (throughput.py reserves at most 30.0 GiB); packs and layers computed again are what `train`
would choose there on an H200.
"""

import argparse
from dataclasses import dataclass

from common import append_result

from qwhisper.data.row_sizes import Rows
from qwhisper.engine.plan_choice import choose
from qwhisper.engine.plan_memory import GIB, Execution, Job, Weights
from qwhisper.engine.plan_sizes import AUDIO_SIZES, TEXT_SIZES
from qwhisper.engine.plan_speed import CARDS, samples_a_second
from qwhisper.train.fit import MARGIN

H200 = next(card for card in CARDS if card.name == "H200")


@dataclass(frozen=True)
class Case:
    """batch: samples a step. steps: of the run. gib: that PyTorch may reserve."""

    size: str
    weights: Weights = "bf16"
    batch: int = 128
    steps: int = 14
    gib: float = 30.0
    use_lora: bool = True
    distils: bool = False


CASES = {
    "0.6b": Case("0.6b"),
    "0.6b-1x4": Case("0.6b", batch=4, steps=62),
    "8b-bf16": Case("8b", steps=8),
    "8b-bf16-1x4": Case("8b", batch=4, steps=42),
    "8b-fp8": Case("8b", "fp8", steps=8),
    "0.6b-distill": Case("0.6b", use_lora=False, distils=True),
    "0.6b-no-distill": Case("0.6b", use_lora=False),
    "8b-distill": Case("8b", use_lora=False, distils=True, steps=8),
    "8b-nf4": Case("8b", "nf4", batch=4, steps=42, gib=12.0),
    "14b-nf4": Case("14b", "nf4", batch=4, steps=42, gib=20.0),
    "32b-nf4": Case("32b", "nf4", batch=4, steps=42, gib=30.0),
    "4b": Case("4b"),
}


def predict(case: Case, execution: Execution) -> dict:
    job = Job(
        text=TEXT_SIZES[f"qwen3-{case.size}"],
        audio=AUDIO_SIZES["whisper-large-v3-turbo"],
        weights=case.weights,
        lora_r=16 if case.use_lora else 0,
        distils=case.distils,
        execution=execution,
    )
    rows = Rows()  # of real_shapes.py's data, by the same seeds
    choice = choose(job, rows, case.batch, int(MARGIN * case.gib * GIB), H200, steps=case.steps)
    fast = samples_a_second(job, rows, choice.tokens, choice.recompute_layers, H200, case.batch)
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
    for name, case in CASES.items():
        if args.case in (None, name):
            found = {"case": name, "execution": args.execution, **predict(case, args.execution)}
            append_result("plan_predictions", found)


if __name__ == "__main__":
    main()
