"""Three hundred steps with faults of every kind in one of twenty samples, steps and clips: the soak of
benchmarks/chaos.py, short."""

from pathlib import Path

import pytest

from tests.test_faults.inject import RandomFaults, outcome_of, spoil_clips
from tests.train.helpers import read_lines

SHARE = 0.05


@pytest.mark.slow
def test_nothing_crashes_all_stays_finite_and_what_is_logged_is_what_was_injected(
    arguments, train_file, tmp_path, monkeypatch
):
    faults = RandomFaults(share=SHARE, seed=1)
    spoiled = spoil_clips(train_file, tmp_path / "spoiled/train.jsonl", 2 / 12, seed=1)
    faults.plant(monkeypatch)
    args = arguments(
        train_file=str(tmp_path / "spoiled/train.jsonl"), data_root="/", max_bad_fraction=0.5,
        max_steps=300, save_steps=100, logging_steps=100, learning_rate=1e-3,
    )  # fmt: skip
    outcome = outcome_of(args)
    assert outcome.code == 0 and outcome.finite
    assert outcome.dropped == faults.samples and len(outcome.dropped) > 20 and len(faults.peaks) > 5
    assert {line["id"] for line in read_lines(Path(args.output_dir) / "quarantine.jsonl")} == spoiled
    assert outcome.count("rewind") == 0
