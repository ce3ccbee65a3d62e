"""The run folder's logs.

metrics.jsonl has every step, events.jsonl every act of a guard, quarantine.jsonl every bad sample.
"""

import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends one JSON object a line; a line is complete on disk as soon as it is written."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _append(self, file: str, record: dict[str, Any]) -> None:
        with (self.folder / file).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, ensure_ascii=False) + "\n")

    def metric(self, **values: Any) -> None:
        self._append("metrics.jsonl", values)

    def event(self, kind: str, *, step: int, **values: Any) -> None:
        self._append("events.jsonl", {"time": round(time.time(), 3), "kind": kind, "step": step} | values)

    def quarantine(self, *, id: str, source: str, reason: str, step: int) -> None:
        self._append("quarantine.jsonl", {"id": id, "source": source, "reason": reason, "step": step})


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of one of these files; an empty list where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
