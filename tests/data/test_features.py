"""A clip is found in the cache by its content and stretch, under the same settings alone."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwhisper.data.clips import AudioClip
from qwhisper.data.feature_store import FeatureFolder, FeatureWriter, InMemory
from qwhisper.data.features import CachedClip, FeatureReader, MissingClip, kept
from qwhisper.data.waveform import sound_of_bytes
from qwhisper.frames import FrameArithmetic
from tests.small import tone

FRAMES = FrameArithmetic(lead_silence_s=0.2, tail_silence_s=1.0)
LENGTH = 16_000


@pytest.fixture
def clip(tmp_path) -> AudioClip:
    path = tmp_path.resolve() / "a.wav"
    soundfile.write(path, tone(440, 1.0), 16_000)
    os.utime(path, (0, 0))
    return AudioClip(str(path))


def reader_of(folder: Path, settings: bytes = b"settings", frames: FrameArithmetic = FRAMES) -> FeatureReader:
    return FeatureReader(FeatureFolder(folder / "cache", 2, "fp16"), frames, settings)


def store(reader: FeatureReader, clip: AudioClip, num_samples: int = LENGTH, count: int | None = None) -> InMemory:
    count = sum(frames for _, frames in kept(num_samples, reader.frames)) if count is None else count
    rows = InMemory(np.arange(2 * count, dtype=np.float16).reshape(-1, 2))
    writer = FeatureWriter(reader.found)
    writer.append(reader.key(clip), num_samples, rows, ["a note"])
    writer.close()
    return rows


def test_a_clip_is_found_with_its_windows_and_notes(tmp_path, clip):
    seconds = 70
    reader = reader_of(tmp_path)
    missing = reader.find(clip)
    assert missing == MissingClip(reader.key(clip)) and missing.key
    rows = store(reader, clip, seconds * 16_000)
    found = pickle.loads(pickle.dumps(reader)).find(clip)  # as a worker gets it
    assert isinstance(found, CachedClip)
    assert found.num_samples == seconds * 16_000 and found.notes == ["a note"]
    assert [len(window) for window in found.windows] == FRAMES.window_lengths(seconds * 16_000) and len(
        found.windows
    ) > 1
    first = 0
    for window in found.windows:
        values = np.empty((window.num_frames, 2), dtype=np.float16)
        window.rows.copy_to(values, None)
        assert np.array_equal(values, rows.values[first : first + window.num_frames])
        first += window.num_frames
    assert first == len(rows.values)


def test_the_key_depends_on_content_stretch_channel_and_settings(tmp_path, clip):
    reader = reader_of(tmp_path)
    copied = tmp_path.resolve() / "copy.wav"
    copied.write_bytes(Path(clip.path).read_bytes())
    same = [
        AudioClip(str(copied)),
        AudioClip("", sound=sound_of_bytes(copied.read_bytes(), "message 1")),
        replace(clip, transcript="words"),
    ]
    assert {reader.key(other) for other in same} == {reader.key(clip)}
    copied.write_bytes(copied.read_bytes()[:-2] + b"\1\1")
    others = [
        AudioClip(str(copied)),
        replace(clip, start=0.1),
        replace(clip, end=0.5),
        replace(clip, start=0.1, end=0.5),
        replace(clip, channel=0),
    ]
    keys = [reader.key(other) for other in (clip, *others)] + [reader_of(tmp_path, b"others").key(clip)]
    assert len(set(keys)) == len(keys) and None not in keys


@pytest.mark.parametrize("settled", [True, False])
def test_a_changed_file_is_never_found(tmp_path, clip, settled, monkeypatch):
    """Of the same size and time of change (mtime), also if its hash is remembered."""
    monkeypatch.setattr("qwhisper.data.features.SETTLED_NS", -(10**18) if settled else 2 * 10**9)
    reader = reader_of(tmp_path)
    store(reader, clip)
    assert isinstance(reader.find(clip), CachedClip)
    assert bool(reader._digests) == settled
    with open(clip.path, "r+b") as file:
        file.seek(1000)
        file.write(b"\1\2\3")
    while settled and os.stat(clip.path).st_ctime_ns == reader._digests[clip.path][0][-1]:
        os.utime(clip.path)  # until the file system's clock has ticked: SETTLED_NS excludes this case
    os.utime(clip.path, (0, 0))
    assert isinstance(reader.find(clip), MissingClip)


def test_a_remembered_hash_is_used_without_reading_the_file(tmp_path, clip, monkeypatch):
    monkeypatch.setattr("qwhisper.data.features.SETTLED_NS", -(10**18))
    reader = reader_of(tmp_path)
    key = reader.key(clip)
    monkeypatch.setattr("qwhisper.data.features.opened", None)
    assert reader.key(clip) == key


def test_what_cannot_be_read_has_no_key(tmp_path, clip, monkeypatch):
    reader = reader_of(tmp_path)
    link, fifo = tmp_path.resolve() / "link.wav", tmp_path.resolve() / "fifo.wav"
    link.symlink_to(clip.path)
    os.mkfifo(fifo)
    for path in (tmp_path / "none.wav", link, fifo, tmp_path):
        assert reader.find(AudioClip(str(path))) == MissingClip(None)
    monkeypatch.setattr("qwhisper.data.features.LARGEST_FILE", 1000)
    assert reader.find(clip) == MissingClip(None)


def test_a_record_of_another_length_than_its_clips_is_bad(tmp_path, clip):
    reader = reader_of(tmp_path)
    store(reader, clip, count=3)
    found = reader.find(clip)
    assert isinstance(found, MissingClip) and found.bad is not None and found.key == reader.key(clip)
