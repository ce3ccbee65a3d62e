"""What a run's log knows of the whole run. Logs that can't be written are in tests/test_faults/test_logger.py."""

import pytest

from qwhisper.report.events import RunLog, acts, read_jsonl
from qwhisper.report.kinds import Resumed
from tests.report.examples import BEGIN, END, SKIPPED


def test_a_resumed_run_knows_the_events_and_the_bad_dialogues_of_before(tmp_path):
    for epoch in range(2):
        log = RunLog(tmp_path)
        log.event(SKIPPED, step=epoch)
        log.quarantine(id="a", source="data.jsonl:1", reason="silent", step=epoch)
        log.quarantine(id="a", source="data.jsonl:2", reason="unreadable", step=epoch)
    assert log.kinds == {"skipped": 2}
    assert log.quarantined == {"data.jsonl:1": "silent", "data.jsonl:2": "unreadable"}


@pytest.mark.parametrize("spoil", [
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("/dev/full"),  # which can be read for ever
    lambda path: path.symlink_to("/proc/self/mem"),  # EIO
    lambda path: path.write_text('null\n5\n"a"\n{half'),
])  # fmt: skip
def test_a_log_of_before_that_can_not_be_read_is_none(tmp_path, spoil):
    spoil(tmp_path / "events.jsonl")
    log = RunLog(tmp_path)
    assert not log.kinds
    log.event(SKIPPED, step=1)
    assert log.kinds == {"skipped": 1}


def test_the_course_of_a_run_is_no_act_of_a_guard(tmp_path):
    log = RunLog(tmp_path)
    for event in (BEGIN, SKIPPED, END, Resumed(checkpoint="checkpoint-0", **BEGIN.written())):
        log.event(event, step=0)
    assert log.kinds == RunLog(tmp_path).kinds == {"skipped": 1}
    assert [event["kind"] for event in acts(read_jsonl(tmp_path / "events.jsonl"))] == ["skipped"]
    assert RunLog(tmp_path).run_id() == "a" and RunLog(tmp_path / "none").run_id() is None
