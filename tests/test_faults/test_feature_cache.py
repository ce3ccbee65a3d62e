"""A feature cache that is damaged, cut or full, and clips that change under it."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwhisper.data.feature_store import ENTRY_BYTES, INDEX_FILE, FeatureFolder, FeatureWriter
from qwhisper.data.features import FeatureReader
from qwhisper.engine.feature_cache import FeatureCache
from tests.small import write_dialogues
from tests.test_faults.inject import Outcome, outcome_of
from tests.test_faults.kill_shim import fail
from tests.test_faults.matrix import fault
from tests.train.helpers import count_calls, read_lines

ONE_PASS = {"max_steps": 3, "save_steps": 100}


@pytest.fixture
def run(arguments, tmp_path):
    """Runs one pass over the data into a folder of that name. Returns its outcome and losses."""

    def run(name: str, **values) -> tuple[Outcome, list[float]]:
        args = arguments(
            **ONE_PASS | {"feature_cache": str(tmp_path / "cache")} | values, output_dir=str(tmp_path / name)
        )
        outcome = outcome_of(args)
        return outcome, [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]

    return run


def cached_file(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "cache").glob(f"*/{name}")
    return found


def checksums_are_ignored(monkeypatch) -> None:
    monkeypatch.setattr(FeatureFolder, "is_sound", lambda self, entry: True)


@fault(
    "a flipped bit in a record of --feature_cache",
    of="disk",
    guarantee="its checksum differs: an event names the clip, which is encoded again; the run equals one with a sound "
    "cache",
    without=checksums_are_ignored,
    slow=True,
)
def test_damaged_features(run, tmp_path, monkeypatch):
    _, expected = run("first")
    shard = cached_file(tmp_path, "*.features")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 + 1] ^= 4  # of an exponent
    shard.write_bytes(content)
    counts = count_calls(monkeypatch)
    outcome, losses = run("second")
    assert outcome.code == 0 and outcome.count("cached_features_damaged") == 1 and counts["encoder"] == 1
    assert losses == expected
    outcome, losses = run("third")
    assert outcome.count("cached_features_damaged") == 0 and counts["encoder"] == 1 and losses == expected


def errors_of_the_disk_end_the_run(monkeypatch) -> None:
    def keep(self, clip, rows):
        self.writer.append(clip.missing.key, clip.num_samples, rows, clip.notes)
        return []

    monkeypatch.setattr(FeatureCache, "_keep", keep)


@fault(
    "the disk is full while features are written to --feature_cache",
    of="disk",
    guarantee="one event says so, nothing more is written, and the run continues to its end",
    without=errors_of_the_disk_end_the_run,
    slow=True,
)
def test_full_disk_under_the_cache(run, monkeypatch):
    honest, appended = FeatureWriter.append, []

    def append(*args):
        appended.append(args)
        if len(appended) > 3:
            fail(errno.ENOSPC)()
        return honest(*args)

    monkeypatch.setattr(FeatureWriter, "append", append)
    outcome, losses = run("full")
    assert outcome.code == 0 and len(losses) == 3 and len(appended) == 4
    (event,) = [event for event in outcome.events if event["kind"] == "features_not_cached"]
    assert "No space left on device" in event["error"]


def torn_entries_stay(monkeypatch) -> None:
    monkeypatch.setattr(os, "ftruncate", lambda descriptor, length: None)


@fault(
    "a kill while an entry of --feature_cache is written",
    of="process",
    guarantee="the next run cuts off the torn entry and writes the clip again; nothing else is lost",
    without=torn_entries_stay,
    slow=True,
)
def test_torn_entry(run, tmp_path, monkeypatch):
    _, expected = run("first")
    index = cached_file(tmp_path, INDEX_FILE)
    content = index.read_bytes()
    index.write_bytes(content[: -ENTRY_BYTES // 2])
    counts = count_calls(monkeypatch)
    assert run("second")[1] == expected and counts["encoder"] == 1 == counts["decoder"]
    assert run("third")[1] == expected and counts["encoder"] == 1 == counts["decoder"]
    assert len(index.read_bytes()) == len(content)


def a_file_is_known_by_its_name(monkeypatch) -> None:
    monkeypatch.setattr(
        FeatureReader, "_file_digest", lambda self, path: hashlib.blake2b(path.encode(), digest_size=16).digest()
    )


@fault(
    "a clip that is replaced by another of the same size and time, with the old one's features in --feature_cache",
    of="data",
    guarantee="the content decides: the new clip is decoded and encoded",
    without=a_file_is_known_by_its_name,
    slow=True,
)
def test_replaced_clip(run, tmp_path, monkeypatch):
    data = {"train_file": str(write_dialogues(tmp_path / "data", 4))}
    clip = tmp_path / "data" / "clip2.wav"
    os.utime(clip, (0, 0))
    run("first", **data)
    sound, rate = soundfile.read(clip, dtype="float32")
    soundfile.write(clip, np.sign(sound) * 0.3, rate)
    os.utime(clip, (0, 0))
    counts = count_calls(monkeypatch)
    _, losses = run("second", **data)
    assert counts == {"encoder": 1, "decoder": 1}
    assert losses == pytest.approx(run("plain", feature_cache=None, **data)[1], abs=1e-5)
