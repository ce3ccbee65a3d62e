"""Writes the tables of docs/events.md, between their marks: python docs/make_event_tables.py

They show what qwhisper/report/kinds.py and metrics.py declare.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args

from marked import table, write_between_marks

from qwhisper.report.kinds import KINDS, Begin, Event, Resumed, is_written
from qwhisper.report.metrics import METRICS

PAGE = Path(__file__).parent / "events.md"


def type_name(annotation: type) -> str:
    """As in JSON: `list[str]`, `int or null`."""
    text = annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
    text = re.sub(r"Literal\[(.*)\]", lambda found: found[1].replace("'", '"').replace(", ", " or "), text)
    return text.replace("typing.", "").replace(" | None", " or null").replace(" | ", " or ")


def fields_of(kind: type[Event]) -> str:
    """One a line: name, type and what it is."""
    shown = [field for field in fields(kind) if is_written(field.type)]
    if kind is Resumed:  # the other fields stand in the row of `begin`
        shown = [field for field in shown if field not in fields(Begin)]
    lines = []
    for field in shown:
        type_, what = get_args(field.type)[:2]
        lines.append(f"`{field.name}` ({type_name(type_)}): {what}")
    return "<br>".join(lines)


def event_table(*, is_course: bool) -> str:
    rows = []
    for kind in KINDS:
        if kind.is_course == is_course:
            is_printed = "no" if kind.line is Event.line else "yes"
            rows.append((f"`{kind.kind}`", kind.__doc__, is_printed, fields_of(kind)))
    return table("kind | what happened | printed | fields", rows)


def metrics_table() -> str:
    return table("field | what it is", [(f"`{name}`", what) for name, what in METRICS.items()])


TABLES: dict[str, Callable[[], str]] = {
    "course": lambda: event_table(is_course=True),
    "guards": lambda: event_table(is_course=False),
    "metrics": metrics_table,
}


def main() -> None:
    write_between_marks(PAGE, {name: make() for name, make in TABLES.items()})


if __name__ == "__main__":
    main()
