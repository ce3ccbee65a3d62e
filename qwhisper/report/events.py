"""The run folder's logs.

metrics.jsonl has every step, events.jsonl the run's course and every act of a guard, quarantine.jsonl every bad sample.
The kinds of event and the fields of metrics.jsonl are declared in kinds.py.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwhisper.report.kinds import KINDS, Event

COURSE = frozenset(event.kind for event in KINDS if event.is_course)


class RunLog:
    """Appends one JSON object a line; a line is complete on disk as soon as it is written.

    If a log can't be written, that is reported once and the line is lost: no run ends because of its log.
    kinds: number of events by kind, without COURSE. quarantined: the reason, by source of each bad dialogue. Both cover
    the whole run, as far as the files from before a resume can be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.kinds = Counter(str(act.get("kind")) for act in acts(_readable(folder / "events.jsonl")))
        bad = _readable(folder / "quarantine.jsonl")
        self.quarantined = {str(record.get("source")): str(record.get("reason")) for record in bad}
        self._torn: dict[str, bool] = {}  # by file: whether it may end in an incomplete line
        self._lost: set[str] = set()

    def append(self, file: str, record: dict[str, Any]) -> None:
        path = self.folder / file
        line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            if self._torn.get(file, True):  # a kill or a full disk interrupted a line
                line = "\n" * ends_in_half_a_line(path) + line
            self._torn[file] = True
            with path.open("a", encoding="utf-8") as handle:
                handle.write(line)
            self._torn[file] = False
        except OSError as error:
            if file not in self._lost:
                self._lost.add(file)
                print(
                    f"{path} can't be written ({error}): the run continues without; free disk space or repair the disk",
                    file=sys.stderr,
                )

    def metric(self, **values: Any) -> None:
        self.append("metrics.jsonl", values)

    def event(self, event: Event, *, step: int) -> None:
        if not event.is_course:
            self.kinds[event.kind] += 1
        record = {"time": round(time.time(), 3), "kind": event.kind, "step": step} | event.written()
        self.append("events.jsonl", record)

    def run_id(self) -> str | None:
        """The id that the run got when it began; None if events.jsonl doesn't have it."""
        ids = [event["run_id"] for event in _readable(self.folder / "events.jsonl") if "run_id" in event]
        return str(ids[-1]) if ids else None

    def quarantine(self, *, id: str, source: str, reason: str, step: int) -> None:
        self.quarantined[source] = reason
        self.append("quarantine.jsonl", {"id": id, "source": source, "reason": reason, "step": step})


def readable(statistics: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN: non-finite numbers become their names."""
    return {name: value if abs(value) < float("inf") else str(value) for name, value in statistics.items()}


def acts(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that are not of the run's course: acts of guards, and alarms."""
    return [event for event in events if event.get("kind") not in COURSE]


def ends_in_half_a_line(path: Path) -> bool:
    """Whether the last line is incomplete, as a kill or a full disk leaves it."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) != b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete records of one of these files; an empty list if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [record for line in lines if (record := _parse(line)) is not None]


def _readable(path: Path) -> list[dict[str, Any]]:
    """Like `read_jsonl`; an empty list also if the path is not a regular file or can't be read."""
    try:
        return read_jsonl(path) if path.is_file() else []
    except OSError:
        return []


def _parse(line: str) -> dict[str, Any] | None:
    """The record, or None for an incomplete line, which a kill or a full disk leaves, and for anything else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
