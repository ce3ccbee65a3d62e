"""A cache of features gives back what was written to it, or nothing: after a kill, a full disk or a flipped bit."""

import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwhisper.data.feature_store import (
    ENTRY_BYTES,
    INDEX_FILE,
    STORED_AS,
    FeatureFolder,
    FeatureWriter,
    InMemory,
)
from qwhisper.errors import DiskError, UsageError

WIDTH = 3
NOTES = ["clip.wav: its channels cancel each other"]
formats = pytest.mark.parametrize("stored_as", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])


def features(count: int, stored_as: str = "fp16", seed: int = 0) -> InMemory:
    numbers = np.random.default_rng([count, seed])
    if stored_as == "fp16":
        return InMemory(numbers.normal(size=(count, WIDTH)).astype(np.float16))
    values = numbers.integers(-127, 128, (count, WIDTH)).astype(np.int8)
    return InMemory(values, numbers.random(count).astype(np.float16))


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "little")  # ends with zeros


def read(found: FeatureFolder, key: bytes, first: int = 0) -> InMemory | None:
    """The rows of a record from `first` on; None if there is none, or a bad one."""
    entry = found.find(key)
    if entry is None or not found.is_sound(entry):
        return None
    count = entry.num_frames - first
    values = np.empty((count, WIDTH), dtype=STORED_AS[found.stored_as])
    scales = None if found.stored_as == "fp16" else np.empty(count, dtype=np.float16)
    found.rows(entry, first).copy_to(values, scales)
    return InMemory(values, scales)


def same(a: InMemory | None, b: InMemory, first: int = 0) -> bool:
    return (
        a is not None
        and np.array_equal(a.values, b.values[first:])
        and (b.scales is None or np.array_equal(a.scales, b.scales[first:]))
    )


@contextmanager
def writing(folder: Path, stored_as: str = "fp16", **values):
    writer = FeatureWriter(FeatureFolder(folder, WIDTH, stored_as), **values)
    try:
        yield writer
    finally:
        writer.close()


@formats
@settings(max_examples=8)
@given(runs=st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=6), max_size=4))
def test_every_record_is_found_by_every_reader_and_the_last_of_a_key_counts(tmp_path_factory, stored_as, runs):
    folder, expected = tmp_path_factory.mktemp("cache"), {}
    early = FeatureFolder(folder, WIDTH, stored_as)
    for number, run in enumerate(runs):
        with writing(folder, stored_as, shard_bytes=60) as writer:
            for key, count in run:
                expected[key] = features(count, stored_as, seed=number)
                writer.append(key_of(key), 100 * count, expected[key], NOTES if key else [])
                assert early.find(key_of(key)) or key in expected
    late = FeatureFolder(folder, WIDTH, stored_as)
    early.refresh()
    for found in (early, late):
        for key in range(6):
            entry = found.find(key_of(key))
            assert (entry is None) == (key not in expected)
            if entry is not None:
                rows = expected[key]
                assert (entry.num_frames, entry.num_samples) == (len(rows.values), 100 * len(rows.values))
                assert found.notes(entry) == (NOTES if key else [])
                first = len(rows.values) // 2
                assert same(read(found, key_of(key)), rows)
                assert first == len(rows.values) or same(read(found, key_of(key), first), rows, first)
    assert all(path.stat().st_size <= 60 or path.stat().st_size <= 6 * 8 + 100 for path in folder.glob("*.features"))


@formats
def test_cut_at_any_byte_the_records_before_are_whole_and_the_rest_is_written_again(tmp_path, stored_as):
    rows = {n: features(1 + n // 2, stored_as) for n in range(3)}
    with writing(tmp_path / "whole", stored_as) as writer:
        ends = []
        for n, each in rows.items():
            entry = writer.append(key_of(n), 1, each, NOTES[:n])
            ends.append(entry.offset + entry.num_frames * writer.found.frame_bytes + entry.notes_bytes)
    shard, index = ((tmp_path / "whole" / name).read_bytes() for name in ("00000.features", INDEX_FILE))
    assert len(shard) == ends[-1] and len(index) == 3 * ENTRY_BYTES

    def check(shard: bytes, index: bytes, whole: int) -> None:
        folder = tmp_path / f"{len(shard)}-{len(index)}"
        folder.mkdir()
        (folder / "00000.features").write_bytes(shard)
        (folder / INDEX_FILE).write_bytes(index)
        found = FeatureFolder(folder, WIDTH, stored_as)
        assert [same(read(found, key_of(n)), rows[n]) for n in rows] == [n < whole for n in rows]
        with writing(folder, stored_as) as writer:
            for n in range(whole, 3):
                writer.append(key_of(n), 1, rows[n])
        found = FeatureFolder(folder, WIDTH, stored_as)
        assert all(same(read(found, key_of(n)), rows[n]) for n in rows)

    for length in range(len(shard)):
        check(shard[:length], index, sum(end <= length for end in ends))
    for length in range(len(index)):
        check(shard, index[:length], length // ENTRY_BYTES)


@formats
def test_a_flipped_bit_is_found(tmp_path, stored_as):
    rows = [features(2, stored_as, seed=n) for n in range(2)]
    with writing(tmp_path, stored_as) as writer:
        for n in range(2):
            writer.append(key_of(n), 1, rows[n])
    for name in ("00000.features", INDEX_FILE):
        sound = (tmp_path / name).read_bytes()
        for at in range(len(sound)):
            bad = bytearray(sound)
            bad[at] ^= 1 << at % 8
            (tmp_path / name).write_bytes(bad)
            hit = at // (len(sound) // 2)
            found = FeatureFolder(tmp_path, WIDTH, stored_as)
            assert [same(read(found, key_of(n)), rows[n]) for n in range(2)] == [n != hit for n in range(2)]
        (tmp_path / name).write_bytes(sound)


def test_a_bad_record_is_forgotten_until_another_replaces_it(tmp_path):
    reader = FeatureFolder(tmp_path, WIDTH, "fp16")
    with writing(tmp_path) as writer:
        writer.append(key_of(0), 1, features(2))
        bad = reader.find(key_of(0))
        reader.forget(bad)
        assert reader.find(key_of(0)) is None
        writer.append(key_of(0), 1, features(3))
        assert reader.find(key_of(0)).num_frames == 3
        reader.forget(bad)
        assert reader.find(key_of(0)).num_frames == 3


@formats
def test_a_full_disk_leaves_all_or_nothing_of_a_record(tmp_path, stored_as):
    """A limit on the size of files writes a part and then fails, as a full disk does."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writing(tmp_path, stored_as) as writer:
        writer.append(key_of(0), 1, features(20, stored_as))
        size = (tmp_path / "00000.features").stat().st_size
        for limit in (size + 5, ENTRY_BYTES + 5):  # within the record; within its entry
            writer.shard_bytes = size * 100 if limit > size else 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
            try:
                with pytest.raises(OSError, match="File too large"):
                    writer.append(key_of(1), 1, features(2 if limit < size else 20, stored_as))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, usual)
            assert (tmp_path / INDEX_FILE).stat().st_size == ENTRY_BYTES
            assert sum(path.stat().st_size for path in tmp_path.glob("*.features")) == size
        writer.append(key_of(1), 1, features(4, stored_as))
    found = FeatureFolder(tmp_path, WIDTH, stored_as)
    assert same(read(found, key_of(0)), features(20, stored_as))
    assert same(read(found, key_of(1)), features(4, stored_as))


def test_one_process_writes_and_another_only_reads(tmp_path):
    with writing(tmp_path) as writer:
        other = FeatureFolder(tmp_path, WIDTH, "fp16")
        with pytest.raises(UsageError, match="another run writes into it"):
            FeatureWriter(other)
        assert FeatureWriter.open(other) is None
        writer.append(key_of(0), 1, features(2))
        assert same(read(other, key_of(0)), features(2))
    late = FeatureWriter.open(other)
    late.append(key_of(1), 1, features(3))
    late.close()
    assert sorted(path.name for path in tmp_path.glob("*.features")) == ["00000.features", "00001.features"]


def test_a_killed_writer_leaves_whole_records_and_no_lock(tmp_path):
    said, saying = os.pipe()
    child = os.fork()
    if child == 0:
        writer = FeatureWriter(FeatureFolder(tmp_path, WIDTH, "fp16"), shard_bytes=500)
        for n in range(10**6):
            writer.append(key_of(n), 1, features(9, seed=n))
            os.write(saying, b".")
    os.close(saying)
    count = sum(len(os.read(said, 1)) for _ in range(20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(said)
    with writing(tmp_path) as writer:
        entries = (tmp_path / INDEX_FILE).stat().st_size // ENTRY_BYTES
        assert entries >= count
        assert all(same(read(writer.found, key_of(n)), features(9, seed=n)) for n in range(entries))


def test_a_file_that_is_cut_after_its_checksum_was_compared_is_an_error(tmp_path):
    with writing(tmp_path) as writer:
        entry = writer.append(key_of(0), 1, features(4))
        place = writer.found.rows(entry, 0)
        os.truncate(tmp_path / "00000.features", 3)
        with pytest.raises(DiskError, match="was cut while the run reads it"):
            place.copy_to(np.empty((4, WIDTH), dtype=np.float16), None)
        (tmp_path / "00000.features").unlink()
        with pytest.raises(DiskError, match="can't be read"):
            place.copy_to(np.empty((4, WIDTH), dtype=np.float16), None)
        assert read(writer.found, key_of(0)) is None
