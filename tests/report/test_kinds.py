"""The schema of events.jsonl and metrics.jsonl: what is declared is what is written."""

import json
from dataclasses import fields, is_dataclass
from typing import get_args

import pytest

from qwhisper.report import kinds
from qwhisper.report.events import COURSE, RunLog, read_jsonl
from qwhisper.report.kinds import KINDS, Event
from tests.declared import faults_in_runs, faults_of_event, faults_of_metrics
from tests.report.examples import BEGIN, EXAMPLES, SKIPPED


def test_every_kind_that_is_declared_is_listed_and_has_an_example():
    declared = [value for value in vars(kinds).values() if isinstance(value, type) and issubclass(value, Event)]
    assert set(declared) - {Event} == set(KINDS) == {type(event) for event, _ in EXAMPLES}
    assert len({kind.kind for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_every_kind_and_every_field_of_it_says_what_it_is(kind):
    assert is_dataclass(kind) and kind.__doc__.endswith(".") and "\n\n" not in kind.__doc__
    assert all(isinstance(get_args(field.type)[1], str) for field in fields(kind))


@pytest.mark.parametrize(("event", "line"), EXAMPLES, ids=lambda given: getattr(given, "kind", ""))
def test_an_event_comes_back_from_the_file_as_it_was_and_prints_its_line(event, line, tmp_path):
    RunLog(tmp_path).event(event, step=7)
    (record,) = read_jsonl(tmp_path / "events.jsonl")
    assert faults_of_event(record) == []
    head = {"time": record["time"], "kind": event.kind, "step": 7}
    assert list(record.items()) == list((head | event.written()).items())
    only_printed = {field.name: getattr(event, field.name) for field in fields(event) if field.name not in record}
    assert type(event)(**{name: record[name] for name in event.written()}, **only_printed) == event
    assert event.line(7) == line


def test_what_is_only_printed_is_not_written():
    names = {kind.kind: {field.name for field in fields(kind) if not kinds.is_written(field.type)} for kind in KINDS}
    assert {kind: hidden for kind, hidden in names.items() if hidden} == {
        "dropped_samples": {"cause"},
        "save_failed": {"where"},
    }


def test_a_resume_names_its_checkpoint_first():
    resumed = kinds.Resumed(checkpoint="checkpoint-7", **BEGIN.written())
    assert list(resumed.written()) == ["checkpoint", *BEGIN.written()]


def test_only_the_course_of_a_run_is_no_act_of_a_guard():
    assert {"begin", "resumed", "end", "output_lost", "executes", "prepared"} == COURSE


def test_a_record_that_is_not_declared_is_found(tmp_path):
    written = {"time": 1.0, "kind": "skipped", "step": 7} | SKIPPED.written()
    assert faults_of_event(written) == []
    assert faults_of_event(written | {"kind": "jumped"})
    assert faults_of_event(written | {"more": 1}) == ["skipped: more is not declared"]
    assert faults_of_event({name: value for name, value in written.items() if name != "reason"}) == [
        "skipped: reason is missing"
    ]
    assert len(faults_of_event(written | {"samples": [1]})) == len(faults_of_event(written | {"reason": None})) == 1
    assert faults_of_metrics({"step": 1, "loss": "nan", "grad_norm_lora": 2.0}) == []
    assert faults_of_metrics({"loss": None, "grad": 1}) == ["metrics.jsonl: grad is not declared", "loss is no number"]
    log = tmp_path / "run/events.jsonl"
    log.parent.mkdir()
    log.write_text(json.dumps({"kind": "jumped"}) + '\n{"half')
    assert len(faults_in_runs(tmp_path)) == 1
    log.unlink()  # tests/fixtures.py looks for such records after each test
