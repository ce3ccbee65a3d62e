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

from marked import write_between_marks  # noqa: E402

from tests.test_faults.matrix import CLASSES  # noqa: E402  (the repository is no package)

PAGE = ROOT / "docs/reliability.md"
RESULTS = ROOT / "benchmarks/results/faults_vs_hf_trainer.jsonl"
SUMMARY = "summary"  # the name of the results' last line, which counts the others


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


def row_of(fault: dict, told: dict[str, str]) -> str:
    test = f"[{fault['test'].removeprefix('test_')}](../{fault['file'].relative_to(ROOT)})"
    cells = (fault["name"], fault["guarantee"], test, told.get(fault["name"], ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tables() -> str:
    told, rows = hf_outcomes(), faults()
    parts = [f"{len(rows)} faults. Every test runs twice: with its guard, and without it, where it must fail."]
    if SUMMARY in told:
        parts += ["", f"In a plain HF Trainer: {told[SUMMARY]}."]
    for kind in CLASSES:
        parts += [
            "",
            f"### {kind.capitalize()}",
            "",
            "| fault | what you may rely on | test | plain HF Trainer |",
            "|---|---|---|---|",
        ]
        parts += [row_of(fault, told) for fault in rows if fault["of"] == kind]
    return "\n".join(parts)


if __name__ == "__main__":
    write_between_marks(PAGE, {"faults": f"\n{tables()}\n"})
