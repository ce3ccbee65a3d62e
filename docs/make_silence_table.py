"""Writes the table of docs/silence.md, between its two marks: python docs/make_silence_table.py

The figures come from benchmarks/results/silence.jsonl, the latest for each pair of silences.
"""

import json
from pathlib import Path

from marked import table, write_between_marks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "silence.jsonl"


def silence_table() -> str:
    """Markdown, one row a setting, in the order of lead and tail."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    latest = {(result["lead_s"], result["tail_s"]): result for result in map(json.loads, lines)}
    rows = [
        (
            f"{lead:.2f}",
            f"{tail:.2f}",
            f"{result['cosine_to_30_s']:.3f}",
            f"{result['probe_mean']:.2%}",
            f"{result['probe_worst']:.2%}",
        )
        for (lead, tail), result in sorted(latest.items())
    ]
    return table("before, s | after, s | cosine to 30 s | probe, mean | probe, worst speaker", rows)


def main() -> None:
    write_between_marks(ROOT / "docs" / "silence.md", {"silence": silence_table()})


if __name__ == "__main__":
    main()
