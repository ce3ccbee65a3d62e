"""benchmarks/other_trainer.py: what it reads from the trainer's log, and the dialogues that it gives it."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from qwhisper.report.events import read_jsonl

NAMES = ("other_trainer", "real_shapes", "common")


@pytest.fixture
def other_trainer(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("other_trainer")
    for name in NAMES:
        del sys.modules[name]


def test_the_speed_is_that_of_the_steps_after_the_first_third(other_trainer, tmp_path):
    """10 s for the first step, then 2 s each; the log has the mean since the start."""
    ends = {1: 10.0, 2: 12.0, 3: 14.0, 4: 16.0}
    lines = [
        {"loss": 1.0, "global_step/max_steps": f"{n}/4", "train_speed(s/it)": end / n, "memory(GiB)": 20.0 + n}
        for n, end in ends.items()
    ]
    lines.append({"train_loss": 1.0, "global_step/max_steps": "4/4", "train_speed(s/it)": 99.0})  # the summary
    log = tmp_path / "logging.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert other_trainer.figures(log, samples=128, skip=1) == {"samples_s": 64.0, "max_reserved_gib": 24.0}


def test_it_gets_the_same_dialogues(other_trainer, tmp_path):
    data = other_trainer.make_data(tmp_path / "data", 2)
    ours, theirs = read_jsonl(data), read_jsonl(other_trainer.as_swift_reads(data))
    for own, other in zip(ours, theirs, strict=True):
        (clip, question), answer = own["messages"][0]["content"], own["messages"][1]["content"]
        assert other["audios"] == [str(tmp_path / "data" / clip["audio"])] and Path(other["audios"][0]).exists()
        assert [message["content"] for message in other["messages"]] == [f"<audio>{question['text']}", answer]
