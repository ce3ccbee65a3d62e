"""Cached features of clips, as a reader of dialogues finds them: by the content of the clip, without decoding it.

The key of a clip is a hash of its file's bytes (or of sound in memory), the stretch, the channel and the settings.
Equal files hit under any name, and a file that changes never does. The bytes are hashed, not the decoded samples:
hashing needs no decoding, which is what the cache saves; the same sound in another container is encoded once more.
"""

import hashlib
import os
import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from qwhisper.data.clips import AudioClip
from qwhisper.data.feature_store import KEY_BYTES, EncodedWindow, Entry, FeatureFolder, InMemory, OnDisk
from qwhisper.data.files import opened
from qwhisper.errors import BadClipError
from qwhisper.frames import FrameArithmetic, encoder_frames, mel_frames

LARGEST_FILE = 2**32  # bytes; the clips of a larger one are not cached
HASHED_AT_ONCE = 2**20
# A file that changed less than this before it was hashed is hashed again next time: two changes within one tick of the
# file system's clock have the same time.
SETTLED_NS = 2 * 10**9


@dataclass(frozen=True, eq=False)
class CachedClip:
    """A clip that is in the cache, as `dialogue_audio.Heard`."""

    num_samples: int
    windows: list[EncodedWindow]
    notes: list[str]


@dataclass(frozen=True)
class MissingClip:
    """A clip that is not in the cache, or whose record is bad. key: None if it can't be kept."""

    key: bytes | None
    bad: Entry | None = None


@dataclass
class FeatureReader:
    """Looks clips up in a cache. Workers get a copy. settings: what the features depend on besides the sound."""

    found: FeatureFolder
    frames: FrameArithmetic
    settings: bytes
    _digests: dict[str, tuple[Hashable, bytes]] = field(default_factory=dict, repr=False)  # path -> its state, hash

    def __getstate__(self) -> dict:
        return vars(self) | {"_digests": {}}

    def find(self, clip: AudioClip) -> CachedClip | MissingClip:
        key = self.key(clip)
        return MissingClip(None) if key is None else self.find_key(key)

    def find_key(self, key: bytes) -> CachedClip | MissingClip:
        bad = None
        while entry := self.found.find(key):
            windows = self._windows(entry)
            if windows is not None and self.found.is_sound(entry):
                return CachedClip(entry.num_samples, windows, self.found.notes(entry))
            self.found.forget(entry)
            bad = entry
        return MissingClip(key, bad)

    def key(self, clip: AudioClip) -> bytes | None:
        """None if the file can't be read, or is too large."""
        digest = bytes.fromhex(clip.sound.digest) if clip.sound is not None else self._file_digest(clip.path)
        if digest is None:
            return None
        stretch = repr((clip.start, clip.end, clip.channel)).encode()
        return hashlib.blake2b(self.settings + digest + stretch, digest_size=KEY_BYTES).digest()

    def _file_digest(self, path: str) -> bytes | None:
        """16 bytes, as of sound in memory; hashed again only if the file may have changed."""
        try:
            state = _state(os.lstat(path))
            if path in self._digests and self._digests[path][0] == state:
                return self._digests[path][1]
            with opened(path, follow_links=False) as descriptor:
                before = os.fstat(descriptor)
                if before.st_size > LARGEST_FILE:
                    return None
                digest = hashlib.blake2b(digest_size=16)
                while block := os.read(descriptor, HASHED_AT_ONCE):
                    digest.update(block)
        except (BadClipError, OSError):
            return None
        if time.time_ns() - before.st_ctime_ns > SETTLED_NS:
            self._digests[path] = _state(before), digest.digest()
        return digest.digest()

    def _windows(self, entry: Entry) -> list[EncodedWindow] | None:
        """The windows of a record; None if it has another number of frames than its clip."""
        windows, first = [], 0
        for length, count in kept(entry.num_samples, self.frames):
            windows.append(self.window(length, count, self.found.rows(entry, first)))
            first += count
        return windows if first == entry.num_frames else None

    def window(self, num_samples: int, num_frames: int, rows: InMemory | OnDisk) -> EncodedWindow:
        return EncodedWindow(num_samples, num_frames, self.found.width, self.found.stored_as, rows)


def kept(num_samples: int, frames: FrameArithmetic) -> Iterator[tuple[int, int]]:
    """Of each window of a clip: its samples, silence included, and its encoder frames that reach the projector."""
    for length in frames.window_lengths(num_samples):
        part = frames.kept_frames(encoder_frames(mel_frames(length)))
        yield length, part.stop - part.start


def _state(facts: os.stat_result) -> Hashable:
    """The time of change (ctime), which no program can set, differs after any write to the file."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
