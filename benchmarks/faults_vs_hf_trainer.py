"""What a plain Hugging Face Trainer does under the faults of tests/test_faults, each planted into a real run.

    python benchmarks/faults_vs_hf_trainer.py --scratch DIR

Small models of the real architectures on the CPU, in a training script as a user writes it (hf_faults/plain.py). Each
fault is planted in a child of this process. The script records how the child ends, what it logs and saves, and whether
its weights equal those of a run without the fault, and makes a sentence of that. A fault of a part that Trainer lacks
is recorded as such. The results are the last column of docs/reliability.md (docs/make_reliability_table.py). A whole
run takes about three minutes and writes a new file.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from common import RESULTS, ROOT, append_result

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs"))
from hf_faults import data, disk, kernels, memory_and_logger, numerical, processes, saves
from hf_faults.observe import CRASHED, HARMLESS, HUNG, NONE, POISONED, SILENT, UNRESUMABLE, Bench, Verdict
from make_reliability_table import faults

from tests.small import write_small_bases

NAME = "faults_vs_hf_trainer"
CASES = {}
for each in (numerical, kernels, data, processes, saves, disk, memory_and_logger):
    CASES |= each.CASES
COUNTS = {
    POISONED: "ended in success with NaN weights",
    SILENT: "went on in silence with something wrong",
    UNRESUMABLE: "could not be resumed",
    CRASHED: "ended the run",
    HUNG: "hung",
    HARMLESS: "did no harm",
}


def run(bench: Bench, fault: dict) -> Verdict:
    began = time.monotonic()
    verdict = CASES[fault["name"]](bench)
    record = {"name": fault["name"], "of": fault["of"], "kind": verdict.kind, "outcome": verdict.outcome}
    append_result(NAME, record | {"seen": verdict.seen, "seconds": round(time.monotonic() - began, 1)})
    return verdict


def summary(kinds: list[str]) -> dict:
    counts = Counter(kinds)
    planted = len(kinds) - counts[NONE]
    parts = [f"{counts[kind]} {what}" for kind, what in COUNTS.items()]
    outcome = f"of {planted} faults that were planted, {', '.join(parts)}; {counts[NONE]} have no counterpart"
    return {"name": "summary", "faults": len(kinds), "planted": planted, "counts": dict(counts), "outcome": outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--only", default="", help="faults whose name holds this; added to the results that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.scratch.mkdir(parents=True)
    found = faults()
    for name in {fault["name"] for fault in found} - CASES.keys():
        print(f"not planted here, its cell stays empty: {name}")
    if not args.only:
        (RESULTS / f"{NAME}.jsonl").unlink(missing_ok=True)
    bench = Bench(args.scratch.resolve(), write_small_bases(args.scratch.resolve() / "bases"))
    kinds = [run(bench, fault).kind for fault in found if fault["name"] in CASES and args.only in fault["name"]]
    if not args.only:
        append_result(NAME, summary(kinds))


if __name__ == "__main__":
    main()
