"""`qwhisper demo` over several seeds: how many held-out answers are right, and how many survive swapped audio.

    python benchmarks/demo_seeds.py --output_dir DIR --seeds 0 1 2

Ends with exit code 1 where the goal is missed: at least 95 % of answers right on average and 94 % with each seed, at
most 5 % swapped.
"""

import argparse
import json
import sys
from pathlib import Path

from common import append_result, qwhisper


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        folder = args.output_dir.resolve() / f"seed-{seed}"
        qwhisper("demo", "--output_dir", folder, "--seed", seed)
        result = json.loads((folder / "demo.json").read_text())
        results.append(result)
        names = ("seed", "seconds", "turns_before", "turns", "turns_swapped", "dialogues", "majority")
        append_result("demo_seeds", {name: round(result[name], 4) for name in names})
    turns = [result["turns"] for result in results]
    swapped = max(result["turns_swapped"] for result in results)
    print(f"turns {sum(turns) / len(turns):.1%} on average, {min(turns):.1%} at worst; swapped {swapped:.1%} at most")
    return 0 if sum(turns) / len(turns) >= 0.95 and min(turns) >= 0.94 and swapped <= 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
