"""benchmarks/loading.py and loader.py on the small bases."""

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from qwhisper.report.events import read_jsonl
from tests.test_throughput import FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
NAMES = ("loading", "loader", "real_shapes", "common")


@pytest.fixture
def scripts(bases, tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
    """run: calls a script's `main` with flags, and returns its last line."""
    monkeypatch.syspath_prepend(str(FOLDER))
    found = {name: importlib.import_module(name) for name in NAMES}
    monkeypatch.setattr(found["real_shapes"], "WORDS", ("a", "b"))  # a byte is a token here
    monkeypatch.setattr(found["common"], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(found["loading"], "make_bases", lambda *_: bases)
    honest = found["real_shapes"].make_data
    for name in ("loading", "loader"):
        monkeypatch.setattr(found[name], "make_data", lambda folder, _: honest(folder, 8))

    def run(name: str, *flags: object) -> dict:
        shared = ["--tokenizer", bases[1], "--output_dir", tmp_path]
        monkeypatch.setattr(sys, "argv", [name, *map(str, [*shared, *flags])])
        found[name].main()
        return read_jsonl(tmp_path / f"results/{name}.jsonl")[-1]

    yield SimpleNamespace(run=run)
    for name in NAMES:
        del sys.modules[name]


def test_a_start_is_measured_part_by_part(scripts):
    line = scripts.run("loading", "--start", "--dtype", "fp32")
    parts = line["parts"]
    assert 0 < line["before_gib"] < line["peak_rss_anon_gib"] and line["ratio"] > 1  # libraries alone are larger
    inner = ("fingerprints", "tokenizer", "encoder", "language_model", "head_check", "join", "base_record", "lora")
    assert 0 < sum(parts[name] for name in inner) < parts["build_model"] <= line["seconds"] + 0.01
    assert line["imports_s"] < parts["until_first_step"] < parts["until_first_step_ended"]


def test_workers_are_measured(scripts):
    line = scripts.run("loader", "--workers", 1, "--batch", 4, "--steps", 3)
    assert line["samples_s"] > 0 and line["workers_for_650"] >= line["workers_for_335"] >= 1
    assert line["trainer_ms"] > 0 and line["worker_ms"] > 0
