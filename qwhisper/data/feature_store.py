"""The files of `--feature_cache`: what the frozen encoder makes of a clip, kept on disk. NumPy alone, no torch.

A folder holds one encoder's features with one setting:

    00000.features, 00001.features, …   records end to end: values, scales of int8, notes in JSON; at most 1 GiB a file
    index                               one entry of fixed size for each record, with its checksum and its own

Both only grow. A record is written before its entry, and a run that writes begins a new file, so a kill at any
moment leaves bytes that no entry names, or a part of an entry, which the next writer cuts off. Nothing read is trusted:
an entry counts if its checksum is right, a record if it has its length and checksum. One process writes, any number
reads; for a key with several entries the last counts.
"""

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np

from qwhisper.errors import DiskError, UsageError
from qwhisper.locks import hold

INDEX_FILE, LOCK_FILE, SHARD_NAME = "index", "lock", "{:05d}.features"
SHARD_BYTES = 2**30
KEY_BYTES = 32
# key, number of the file, offset, encoder frames, samples at 16 kHz, bytes of notes, checksum of the record
FIELDS = struct.Struct(f"<{KEY_BYTES}sIQIQHI")
CHECKSUM = struct.Struct("<I")
ENTRY_BYTES = FIELDS.size + CHECKSUM.size
BLOCK = 2**20
OPEN_FILES = 256
STORED_AS: dict[str, np.dtype] = {"fp16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
SCALE = np.dtype(np.float16)  # of each frame of int8


@dataclass(frozen=True, eq=False)
class InMemory:
    """values: float16 or int8 [frames, d_model]. scales: float16 [frames] of int8, else None."""

    values: np.ndarray
    scales: np.ndarray | None = None

    def copy_to(self, values: np.ndarray, scales: np.ndarray | None) -> None:
        values[...] = self.values
        if scales is not None:
            scales[...] = self.scales


@dataclass(frozen=True)
class OnDisk:
    """The same in a file, at two offsets."""

    path: str
    values_at: int
    scales_at: int

    def copy_to(self, values: np.ndarray, scales: np.ndarray | None) -> None:
        """Raises DiskError if the file has changed since its checksum was compared."""
        try:
            whole = _fill(self.path, self.values_at, values)
            whole = whole and (scales is None or _fill(self.path, self.scales_at, scales))
        except OSError as error:
            raise DiskError(f"{self.path}: can't be read ({error}): resume the run once it can") from None
        if not whole:
            raise DiskError(f"{self.path}: was cut while the run reads it: resume the run, and let nothing change it")


@dataclass(frozen=True, eq=False)
class EncodedWindow:
    """A window after the encoder: the frames that reach the projector. num_samples: of the window before it, silence
    included, which is also its `len`.
    """

    num_samples: int
    num_frames: int
    width: int
    stored_as: str
    rows: InMemory | OnDisk

    def __len__(self) -> int:
        return self.num_samples


@dataclass(frozen=True)
class Entry:
    """A record's place and contents. num_samples: of the clip."""

    key: bytes
    shard: int
    offset: int
    num_frames: int
    num_samples: int
    notes_bytes: int
    checksum: int

    def packed(self) -> bytes:
        fields = FIELDS.pack(*vars(self).values())
        return fields + CHECKSUM.pack(zlib.crc32(fields))


@dataclass
class FeatureFolder:
    """Finds records. Workers get a copy, which reads the index for itself.

    width: d_model. stored_as: a key of STORED_AS.
    """

    folder: Path
    width: int
    stored_as: str
    _entries: dict[bytes, Entry] = field(default_factory=dict, repr=False)
    _read: int = 0  # bytes of the index that are in `_entries`

    def __getstate__(self) -> dict:
        return vars(self) | {"_entries": {}, "_read": 0}

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame."""
        return frame_bytes(self.width, self.stored_as)

    def find(self, key: bytes) -> Entry | None:
        """The last entry of a key, also one that another process has written since."""
        if key not in self._entries:
            self.refresh()
        return self._entries.get(key)

    def refresh(self) -> None:
        """Read the entries that were added to the index; none if it can't be read."""
        with suppress(OSError), open(self.folder / INDEX_FILE, "rb") as file:
            file.seek(self._read)
            added = file.read()
            whole = len(added) - len(added) % ENTRY_BYTES
            for start in range(0, whole, ENTRY_BYTES):
                if entry := _entry(added[start : start + ENTRY_BYTES]):
                    self._entries[entry.key] = entry
            self._read += whole

    def forget(self, entry: Entry) -> None:
        """Take an entry away whose record is bad, unless another has replaced it."""
        if self._entries.get(entry.key) == entry:
            del self._entries[entry.key]

    def is_sound(self, entry: Entry) -> bool:
        """Whether the record has its length and checksum."""
        checksum, left = 0, entry.num_frames * self.frame_bytes + entry.notes_bytes
        block = np.empty(min(BLOCK, left), dtype=np.uint8)
        at = entry.offset
        try:
            while left:
                part = block[: min(BLOCK, left)]
                if not _fill(self._path(entry), at, part):
                    return False
                checksum, at, left = zlib.crc32(part.data, checksum), at + len(part), left - len(part)
        except OSError:
            return False
        return checksum == entry.checksum

    def notes(self, entry: Entry) -> list[str]:
        """The notes of a sound record."""
        data = np.empty(entry.notes_bytes, dtype=np.uint8)
        _fill(self._path(entry), entry.offset + entry.num_frames * self.frame_bytes, data)
        return json.loads(data.tobytes()) if len(data) else []

    def rows(self, entry: Entry, first: int) -> OnDisk:
        """The place of a record's rows from `first` on."""
        row = self.width * STORED_AS[self.stored_as].itemsize
        scales_at = entry.offset + entry.num_frames * row + first * SCALE.itemsize
        return OnDisk(self._path(entry), entry.offset + first * row, scales_at)

    def _path(self, entry: Entry) -> str:
        return str(self.folder / SHARD_NAME.format(entry.shard))


@dataclass
class FeatureWriter:
    """Appends records. One process at a time: see `open`. Raises OSError if nothing can be written there, UsageError if
    another process has the folder's lock.
    """

    found: FeatureFolder
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        folder = self.found.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(folder / LOCK_FILE, "ab")  # noqa: SIM115  (as long as the run)
        try:
            hold(
                self._lock.fileno(),
                fcntl.flock,
                folder / LOCK_FILE,
                name=f"--feature_cache {folder}",
                place=str(folder),
                writer="run",
                another="folder",
            )
            self._index = FileIO(folder / INDEX_FILE, "ab")
            size = os.fstat(self._index.fileno()).st_size
            os.ftruncate(self._index.fileno(), size - size % ENTRY_BYTES)
        except BaseException:
            self._lock.close()
            raise
        self._shard: FileIO | None = None
        self._number = 1 + max(
            (int(path.stem) for path in folder.glob("*.features") if path.stem.isdigit()), default=-1
        )

    @classmethod
    def open(cls, found: FeatureFolder) -> "FeatureWriter | None":
        """None if another process writes into the folder."""
        try:
            return cls(found)
        except UsageError:
            return None

    def close(self) -> None:
        for file in (self._shard, self._index, self._lock):
            if file is not None:
                file.close()

    def append(self, key: bytes, num_samples: int, rows: InMemory, notes: Sequence[str] = ()) -> Entry:
        """Write a clip's record and its entry. After an OSError neither is there."""
        said = json.dumps(list(notes)).encode() if notes else b""
        said = said if len(said) < 2**16 else b""
        data = [np.ascontiguousarray(rows.values).view(np.uint8).reshape(-1)]
        data += [] if rows.scales is None else [np.ascontiguousarray(rows.scales).view(np.uint8)]
        data += [np.frombuffer(said, dtype=np.uint8)]
        checksum = 0
        for part in data:
            checksum = zlib.crc32(part.data, checksum)
        shard, offset = self._place(sum(map(len, data)))
        entry = Entry(key, self._number, offset, len(rows.values), num_samples, len(said), checksum)
        _append(shard, data)
        try:
            _append(self._index, [np.frombuffer(entry.packed(), dtype=np.uint8)])
        except OSError:
            os.ftruncate(shard.fileno(), offset)
            raise
        self.found.refresh()
        return entry

    def _place(self, size: int) -> tuple[FileIO, int]:
        """The file that a record of `size` bytes is appended to, and its end."""
        if self._shard is not None and (end := os.fstat(self._shard.fileno()).st_size):
            if end + size <= self.shard_bytes:
                return self._shard, end
            self._shard.close()
            self._shard, self._number = None, self._number + 1
        if self._shard is None:
            path = self.found.folder / SHARD_NAME.format(self._number)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._shard = FileIO(os.open(path, flags, 0o666), "ab")
        return self._shard, os.fstat(self._shard.fileno()).st_size


def frame_bytes(width: int, stored_as: str) -> int:
    """Bytes of one frame of `width` values in a record."""
    return width * STORED_AS[stored_as].itemsize + (SCALE.itemsize if stored_as == "int8" else 0)


def _entry(data: bytes) -> Entry | None:
    """None if its checksum is wrong."""
    fields, checksum = data[: FIELDS.size], data[FIELDS.size :]
    return Entry(*FIELDS.unpack(fields)) if CHECKSUM.pack(zlib.crc32(fields)) == checksum else None


def _append(file: FileIO, parts: Sequence[np.ndarray]) -> None:
    """Write all parts at the end, or none of them."""
    end = os.fstat(file.fileno()).st_size
    try:
        for part in parts:
            left = part.data
            while len(left):
                left = left[file.write(left) or 0 :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), end)
        raise


@lru_cache(OPEN_FILES)
def _opened(path: str, inode: int) -> FileIO:
    """inode: a file that took this one's place is another."""
    return FileIO(path, "rb")  # closed when it falls out of the cache


def _fill(path: str, offset: int, array: np.ndarray) -> bool:
    """Fill a contiguous array with bytes of a file; return whether there were enough."""
    file, left = _opened(path, os.stat(path).st_ino), array.view(np.uint8).reshape(-1).data
    while len(left):
        count = os.preadv(file.fileno(), [left], offset)
        if not count:
            return False
        left, offset = left[count:], offset + count
    return True
