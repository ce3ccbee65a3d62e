"""Whether what a run wrote is as qwhisper/report/kinds.py declares it."""

import json
import re
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qwhisper.report.kinds import KINDS, is_written
from qwhisper.report.metrics import METRICS

BY_NAME = {kind.kind: kind for kind in KINDS}
NOT_IN_OLD_RUNS = {
    "begin": {"why_plain", "max_tokens_per_pack", "recompute_layers"}
}  # fields that were added after tests/old_run was written
METRIC_NAMES = [re.compile(name.replace("*", "(lora|projector|encoder)")) for name in METRICS]


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value that was read from JSON has this type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    if annotation is NoneType:
        return value is None
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def faults_of_event(record: dict) -> list[str]:
    """What an event of events.jsonl has that is not declared, or lacks."""
    head, kind = list(record)[:3], BY_NAME.get(record.get("kind", ""))
    if kind is None or head != ["time", "kind", "step"]:
        return [f"no event: {record}"]
    declared = {field.name: field.type for field in fields(kind) if is_written(field.type)}
    given = {name: value for name, value in record.items() if name not in head}
    missing = declared.keys() - given.keys() - NOT_IN_OLD_RUNS.get(kind.kind, set())
    faults = [f"{kind.kind}: {name} is missing" for name in missing]
    faults += [f"{kind.kind}: {name} is not declared" for name in given.keys() - declared.keys()]
    types = {name: value for name, value in given.items() if name in declared and not fits(value, declared[name])}
    return faults + [f"{kind.kind}: {name} is {value!r}, not {declared[name]}" for name, value in types.items()]


def faults_of_metrics(record: dict) -> list[str]:
    unknown = [name for name in record if not any(pattern.fullmatch(name) for pattern in METRIC_NAMES)]
    numbers = {name: value for name, value in record.items() if value not in ("nan", "inf", "-inf")}
    wrong = [name for name, value in numbers.items() if type(value) not in (int, float)]
    return [f"metrics.jsonl: {name} is not declared" for name in unknown] + [f"{name} is no number" for name in wrong]


def faults_in_runs(folder: Path) -> list[str]:
    """Of all runs below it; lines that are torn, and logs that can't be read, are left out."""
    faults = []
    for name, faults_of in (("events.jsonl", faults_of_event), ("metrics.jsonl", faults_of_metrics)):
        for path in folder.rglob(name):
            faults += [fault for record in whole_records(path) for fault in faults_of(record)]
    return faults


def whole_records(path: Path) -> list[dict]:
    if path.is_symlink() or not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records += [record] if isinstance(record, dict) else []
    return records
