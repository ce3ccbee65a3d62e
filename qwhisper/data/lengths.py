"""How long clips are, in samples at 16 kHz, without their audio: dialogues can be laid out before anything is decoded.

A length is exact where the header of a PCM WAV or FLAC file agrees with the structure of the file. For any other file
(an MP3, an Ogg file, one that was written to a pipe, several that were joined) a header gives an estimate: such a clip
is decoded once, and its length kept in memory. The index isn't saved: a run that lays rows out decodes their clips as
well, and reading a header takes no longer than reading an entry of an index.
"""

import os
import struct
from collections.abc import Hashable, Sequence

from qwhisper.data.audio import claimed_seconds
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.containers import chunks, find_layout
from qwhisper.data.dialogue_audio import MAX_DIALOGUE_SECONDS, check_dialogue_seconds
from qwhisper.data.files import FileBytes, opened
from qwhisper.data.flac import counted_samples
from qwhisper.errors import BadClipError
from qwhisper.frames import SAMPLE_RATE, resampled_length

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format tags of WAV


class ClipLengths:
    """The index: called with the clips of a row, it gives their lengths; see `DialogueEncoder.layout`.

    A file's length is kept for as long as its size and time of change stay.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    def __call__(self, clips: Sequence[AudioClip]) -> list[int]:
        """Samples at 16 kHz of each. Raises TooLongError if they exceed the limit of a dialogue, and BadClipError for a
        clip that must be decoded and can't be. Other faults of a clip show when its audio is read.
        """
        lengths: list[int] = []
        for clip in clips:
            left = MAX_DIALOGUE_SECONDS - sum(lengths) / SAMPLE_RATE
            lengths.append(self._length(clip, max(0.0, left)))
            check_dialogue_seconds([length / SAMPLE_RATE for length in lengths])
        return lengths

    def _length(self, clip: AudioClip, at_most_s: float) -> int:
        key = _key(clip)
        if key not in self._known:
            exact = exact_length(clip)
            self._known[key] = len(load_clip(clip, at_most_s=at_most_s)) if exact is None else exact
        return self._known[key]


def _key(clip: AudioClip) -> Hashable:
    stretch = (clip.start, clip.end, clip.channel)
    if clip.sound is not None:
        return clip.sound.digest, *stretch
    try:
        facts = os.stat(clip.path)
    except OSError:
        return clip.path, None, *stretch  # the reader names the fault
    return clip.path, facts.st_size, facts.st_mtime_ns, *stretch


def exact_length(clip: AudioClip) -> int | None:
    """Samples at 16 kHz by the file's header; None if the header gives an estimate or nothing. Decodes nothing."""
    try:
        with opened(clip.source, follow_links=False) as descriptor:
            claim = _exact_claim(FileBytes(descriptor), clip.end)
    except (BadClipError, OSError):
        return None
    if claim is None:
        return None
    num_frames, rate = claim
    # The stretch that `load_audio` reads.
    first = max(0, round((clip.start or 0.0) * rate))
    last = num_frames if clip.end is None else min(num_frames, round(clip.end * rate))
    return resampled_length(last - first, rate) if last > first else None


def length_by_header(clip: AudioClip) -> int:
    """Samples at 16 kHz; an estimate for some kinds of files, and 0 if the header says nothing."""
    exact = exact_length(clip)
    if exact is None:
        return round(SAMPLE_RATE * claimed_seconds(clip.source, clip.start, clip.end, follow_links=False))
    return exact


def _exact_claim(data: FileBytes, end: float | None) -> tuple[int, int] | None:
    """(frames, rate) of a file of one stream whose bytes agree with its header."""
    claim = {b"RIFF": _wav_claim, b"fLaC": counted_samples}.get(data.get(0, 4))
    found = None if claim is None else claim(data)
    if found is None:
        return None
    layout = find_layout(data, end)
    whole = len(layout.streams) == 1 and layout.streams[0].lost is None and not layout.notes
    return found if whole else None


def _wav_claim(data: FileBytes) -> tuple[int, int] | None:
    form = b""
    for chunk in chunks(data, 12, "<"):
        if chunk.name == b"fmt ":
            form = data.get(chunk.start, min(chunk.size, 40))
        elif chunk.name == b"data":
            break
    else:
        return None
    if data.get(8, 4) != b"WAVE" or len(form) < 16 or chunk.start + chunk.size > data.size:
        return None
    tag, channels, rate, _, block, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == EXTENSIBLE and len(form) == 40:
        tag = struct.unpack("<H", form[24:26])[0]
    is_plain = tag in (PCM, FLOAT) and channels and rate and block == channels * -(-bits // 8)
    num_frames, rest = divmod(chunk.size, block) if is_plain else (0, 0)
    return (num_frames, rate) if num_frames and not rest else None
