"""Writes the tables of docs/performance.md, between their marks: python docs/make_performance_tables.py

The figures come from benchmarks/results: throughput.jsonl (the latest line of each case and card, without trials of
other flags), quality.jsonl (compared as quality_report.py does it) and other_trainer.jsonl.
"""

import json
import sys
from pathlib import Path

from marked import table, write_between_marks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
sys.path.append(str(ROOT / "benchmarks"))  # scripts, no package
from quality_report import HEAD, comparisons, read, rows  # noqa: E402
from throughput_cases import CASES  # noqa: E402

SPEED_HEAD = (
    "case | card | samples/s | plain | reserved, GiB | hours of audio an hour | useful ÷ peak | GPU busy | "
    "launches a pack | fill, tokens | fill, frames | first step, s"
)
DISTILLED = ("0.6b", "8b")


def lines_of(name: str) -> list[dict]:
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def latest() -> dict[tuple[str, str], dict]:
    """(case, card): line, in the order of the cases."""
    lines = [line for line in lines_of("throughput") if not line.get("more_flags") and "CPU" not in line["device"]]
    found = {(line["case"], line["device"]): line for line in lines}
    return {key: found[key] for key in sorted(found, key=lambda key: (list(CASES).index(key[0]), key[1]))}


def speed_table() -> str:
    made = []
    for (case, card), line in latest().items():
        useful = line["useful_tflops"] / line["matmul_peak_tflops"]
        made.append([
            f"`{case}`", card, line["samples_s"], line.get("plain_samples_s"), line["max_reserved_gib"],
            line["audio_hours_per_gpu_hour"], f"{useful:.2f}", line["gpu_busy"], line["launches_per_pack"],
            line["fill_tokens"], line["fill_frames"], line.get("first_step_s"),
        ])  # fmt: skip
    return table(SPEED_HEAD, made)


def pairs_table() -> str:
    """Two figures of the same card that belong together: with and without a teacher, before and after a resume."""
    found, made = latest(), []
    for size in DISTILLED:
        for (case, card), line in found.items():
            without = found.get((f"{size}-no-distill", card))
            if case == f"{size}-distill" and without:
                made.append([f"`{case}`, with and without the teacher", card, line["samples_s"], without["samples_s"]])
    for (case, card), line in found.items():
        if "samples_s_before" in line:
            made.append([f"`{case}`, after and before it", card, line["samples_s"], line["samples_s_before"]])
    return table("case | card | samples/s | samples/s | ratio", [[*row, f"{row[2] / row[3]:.2f}"] for row in made])


def quality_table() -> str:
    return table(HEAD, rows(comparisons(read())))


def or_none_yet(made: str) -> str:
    """A table without rows says so."""
    return made if made.count("\n") > 1 else "No figures yet."


def others_table() -> str:
    latest_lines = {(line["case"], line["device"]): line for line in lines_of("other_trainer")}
    ours = {card: line["samples_s"] for (case, card), line in latest().items() if case == "0.6b"}
    made = [
        [f"`{case}`", line["version"], card, line["samples_s"], ours.get(card), line["max_reserved_gib"]]
        for (case, card), line in sorted(latest_lines.items())
        if "CPU" not in card
    ]
    return table("trainer | version | card | samples/s | `qwhisper`, case `0.6b` | reserved, GiB", made)


TABLES = {"speed": speed_table, "pairs": pairs_table, "quality": quality_table, "others": others_table}


def main() -> None:
    write_between_marks(PAGE, {name: or_none_yet(make()) for name, make in TABLES.items()})


if __name__ == "__main__":
    main()
