"""Writes the table of docs/silence.md, between its two marks: python docs/make_silence_table.py

The figures come from benchmarks/results/silence.jsonl, the latest for each pair of silences.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "silence.jsonl"
BEGIN, END = "<!-- silence: begin -->", "<!-- silence: end -->"


def silence_table() -> str:
    """Markdown, one row a setting, in the order of lead and tail."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    latest = {(result["lead_s"], result["tail_s"]): result for result in map(json.loads, lines)}
    rows = [
        f"| {lead:.2f} | {tail:.2f} | {result['cosine_to_30_s']:.3f} | {result['probe_mean']:.2%} | "
        f"{result['probe_worst']:.2%} |"
        for (lead, tail), result in sorted(latest.items())
    ]
    return "\n".join(
        [
            "| before, s | after, s | cosine to 30 s | probe, mean | probe, worst speaker |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def between_marks(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    page = ROOT / "docs" / "silence.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{silence_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
