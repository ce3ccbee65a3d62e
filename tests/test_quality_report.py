"""benchmarks/quality_report.py: paired differences and their intervals, on numbers known by hand."""

import importlib
import math
import random
import sys
from pathlib import Path

import pytest


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("quality_report")
    del sys.modules["quality_report"]


def line(variant, seed, accuracy, loss, right, task="digits", **more):
    return {"task": task, "variant": variant, "seed": seed, "accuracy": accuracy, "loss": loss, "right": right} | {
        "steps": 800,
        **more,
    }


def test_the_interval_over_seeds_is_students(report):
    found = report.over_seeds([1.0, 2.0, 3.0])  # deviation 1
    assert found.mean == 2
    assert found.high - found.mean == found.mean - found.low == pytest.approx(4.303 / math.sqrt(3))
    assert report.over_seeds([1.0]).high == math.inf


def test_the_interval_over_questions_is_that_of_the_paired_difference(report):
    """Where both are wrong in the same answers it has no width, however many they are."""
    generator = random.Random(1)
    plain = "".join(generator.choices("01", k=400))
    same = report.over_questions([(plain, plain)])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    turned = plain.replace("0", "1", 20)
    found = report.over_questions([(plain, turned)])
    assert found.mean == pytest.approx(5.0)
    half = 1.96 * 100 * math.sqrt(0.05 * 0.95 / 400)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)


def test_a_variant_is_compared_with_the_plain_run_of_its_seed(report):
    lines = [
        line("plain", 0, 0.50, 0.10, "1010"),  # of an earlier call
        line("plain", 0, 0.75, 0.20, "1110"),
        line("plain", 1, 1.00, 0.10, "1111"),
        line("fp8", 1, 0.75, 0.11, "1110"),
        line("fp8", 0, 0.75, 0.20, "1101"),
        line("fp8", 2, 0.00, 9.00, "0000"),  # without a plain run
        line("nf4", 0, 0.00, 9.00, "0000", steps=300),  # another number of steps
    ]
    (found,) = report.comparisons(lines)
    assert (found.task, found.variant, found.seeds) == ("digits", "fp8", 2)
    assert found.points.mean == found.by_questions.mean == pytest.approx(-12.5)
    assert found.loss_percent.mean == pytest.approx(5.0)
    assert not found.holds
    assert report.rows([found])[0][3:5] == ["87.5", "75.0"]
    assert len(report.rows([found])[0]) == report.HEAD.count(" | ") + 1


@pytest.mark.parametrize(
    ("accuracy", "loss", "holds"), [(0.486, 0.1009, True), (0.48, 0.1, False), (0.5, 0.102, False), (0.9, 0.05, True)]
)
def test_only_worse_quality_breaks_the_bounds(report, accuracy, loss, holds):
    (found,) = report.comparisons([line("plain", 0, 0.5, 0.1, "10"), line("captured", 0, accuracy, loss, "10")])
    assert found.holds is holds
