"""benchmarks/plan_predictions.py predicts the runs that benchmarks/throughput.py measures."""

import importlib
import sys
from pathlib import Path

from qwhisper.engine.plan_choice import choose
from qwhisper.engine.plan_memory import GIB

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_samples_steps_and_memory_are_those_of_the_measured_case(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    script, asked = importlib.import_module("plan_predictions"), []

    def watched(job, rows, samples, budget, card, *, steps):
        asked.append((job.text.layers, job.weights, samples, steps, budget))
        return choose(job, rows, samples, budget, card, steps=steps)

    monkeypatch.setattr(script, "choose", watched)
    try:
        found = [script.predict(name, "captured") for name in ("0.6b-1x4", "8b-nf4", "32b-nf4")]
    finally:
        for name in {"plan_predictions", "throughput_cases", "throughput_meter", "common"} - before:
            del sys.modules[name]
    # Two steps are profiled after the timed ones.
    assert asked == [
        (28, "bf16", 4, 122, int(0.98 * 30 * GIB)),
        (36, "nf4", 128, 8, int(0.98 * 12 * GIB)),
        (64, "nf4", 128, 5, int(0.98 * 30 * GIB)),
    ]
    for line, gib in zip(found, (30, 12, 30), strict=True):
        assert line["max_reserved_gib"] <= gib
