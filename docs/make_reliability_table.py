"""Writes the tables of docs/reliability.md from the fault tests: python docs/make_reliability_table.py

What each test declares (tests/test_faults/matrix.py) becomes a row. The last column is what a plain Hugging Face
Trainer did under the same injection, from benchmarks/results/faults_vs_hf_trainer.jsonl; empty where that was not run.
"""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from marked import table, write_between_marks  # noqa: E402

from tests.test_faults.matrix import CLASSES  # noqa: E402  (the repository is no package)

PAGE = ROOT / "docs/reliability.md"
RESULTS = ROOT / "benchmarks/results/faults_vs_hf_trainer.jsonl"
SUMMARY = "summary"  # the name of the results' last line, which counts the others
PROMISES = {  # of each class: what happens, and what a user gets
    "numerical": (
        "a number is not finite, a gradient peaks, an attention kernel is wrong, nothing is learned",
        "No NaN reaches a weight through a gradient. Bad samples are dropped and named; if none is left, the step is "
        "skipped and changes nothing. Weights that break in another way go back to a snapshot. Failures that leave no "
        "NaN raise an alarm.",
    ),
    "data": (
        "a clip or a line is broken, hostile or not what it claims to be",
        "A bad line ends the run before a model is loaded, with file and line. A bad clip is quarantined and named; "
        "the run continues. No answer is learned without the audio that it answers.",
    ),
    "process": (
        "a signal, a kill, a worker that dies or hangs, a second trainer in the same folder",
        "A signal leaves a checkpoint. A kill costs at most one save interval, and the resumed run ends in the same "
        "bits as an uninterrupted one.",
    ),
    "disk": (
        "a checkpoint is damaged or incomplete; the disk is full, read-only or failing",
        "A damaged checkpoint is named and never loaded; the next older one is used. A failed save does not end the "
        "run and leaves older checkpoints unchanged.",
    ),
    "memory": (
        "memory runs out, on the GPU or on the host",
        "The pack (samples end to end in one row) is halved and the step runs again: same samples, same gradients. If "
        "that can't help, exit code 4 names the flags that do.",
    ),
    "logger": (
        "a tracker fails, a log can't be written, nobody reads the output",
        "Training continues and does not wait; the failure is reported once.",
    ),
}


def faults() -> list[dict]:
    """Of every fault test its class, name, guarantee, test function and file."""
    found = []
    for path in sorted((ROOT / "tests/test_faults").glob("test_*.py")):
        module = importlib.import_module(f"tests.test_faults.{path.stem}")
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", []):
                if name.startswith("test_") and mark.name == "fault":
                    found.append(
                        {k: mark.kwargs[k] for k in ("of", "name", "guarantee")} | {"test": name, "file": path}
                    )
    return found


def hf_outcomes() -> dict[str, str]:
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {line["name"]: line["outcome"] for line in lines}


def row_of(fault: dict, outcomes: dict[str, str]) -> str:
    test = f"[{fault['test'].removeprefix('test_')}](../{fault['file'].relative_to(ROOT)})"
    cells = (fault["name"], fault["guarantee"], test, outcomes.get(fault["name"], ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def promises() -> str:
    """A row for each class."""
    planted = [fault["of"] for fault in faults()]
    rows = [(f"[{kind}](#{kind})", *PROMISES[kind], planted.count(kind)) for kind in CLASSES]
    return table("faults | what happens | what you get | planted", rows)


def fault_tables() -> str:
    """A section for each class."""
    outcomes, rows = hf_outcomes(), faults()
    twice = "`make test-all` runs every test twice: with its guard, and without it, where it must fail."
    parts = [f"{len(rows)} faults. {twice}"]
    if SUMMARY in outcomes:
        parts += ["", f"In a plain HF Trainer: {outcomes[SUMMARY]}."]
    for kind in CLASSES:
        parts += [
            "",
            f"### {kind.capitalize()}",
            "",
            "| fault | what you may rely on | test | plain HF Trainer |",
            "|---|---|---|---|",
        ]
        parts += [row_of(fault, outcomes) for fault in rows if fault["of"] == kind]
    return "\n".join(parts)


TABLES = {"promises": promises, "faults": fault_tables}


def main() -> None:
    write_between_marks(PAGE, {name: f"\n{make()}\n" for name, make in TABLES.items()})


if __name__ == "__main__":
    main()
