"""The audio of one dialogue: each clip decoded once, within a limit on their total length.

The lengths that headers claim are added up before the first clip is decoded, and the true lengths during decoding: a
short line of JSON can hold eight references to a clip of four hours.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwhisper.data.audio import MAX_SECONDS, TooLongError, claimed_seconds
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.feature_store import EncodedWindow
from qwhisper.data.features import CachedClip, FeatureReader, MissingClip
from qwhisper.data.windows import clip_windows
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic

MAX_DIALOGUE_SECONDS = 2 * 3600  # 0.5 GB of waveform, as much again in windows, 90,000 tokens at 12.5 a second
LARGE_FILE = 2**20  # bytes; smaller files are decoded without asking their headers first: 17 minutes at 8 kbit/s


@dataclass(frozen=True, eq=False)
class Heard:
    """A clip: its length in samples at 16 kHz, its windows, float32 [samples] each, and notes for the user on how it
    was read, without its name: a feature cache keeps them for equal clips of any name. Without windows it was not
    decoded, and its length is its header's claim. missing: set if a feature cache does not have it; a clip that it has
    is not decoded, and its windows are encoded.
    """

    num_samples: int
    windows: Sequence[np.ndarray | EncodedWindow]
    notes: list[str]
    missing: MissingClip | None = None


def claimed_by_headers(clips: Sequence[AudioClip]) -> dict[AudioClip, float]:
    """Seconds that the headers of large files claim. Raises TooLongError if they exceed the limit of a dialogue."""
    large = {clip for clip in clips if _is_large(clip)}
    claimed = {clip: claimed_seconds(clip.source, clip.start, clip.end, follow_links=False) for clip in large}
    check_dialogue_seconds([claimed.get(clip, 0.0) for clip in clips])
    return claimed


def check_dialogue_seconds(seconds: Sequence[float]) -> None:
    """Raise TooLongError if a dialogue's clips, of these lengths in seconds, exceed the limit together."""
    if sum(seconds) > MAX_DIALOGUE_SECONDS:
        raise TooLongError(
            f"{sum(seconds):.5g} s of audio in {len(seconds)} clips, and a dialogue may have {MAX_DIALOGUE_SECONDS}: "
            "divide it, or choose stretches with `start` and `end`"
        )


class DialogueAudio:
    """Decodes the clips of a dialogue, once each, for all rows that are made from it.

    max_length: tokens of a row; a clip that is longer by itself is not decoded. heard: clips that were decoded before,
    with the same frames and max_length; not changed. features: a cache of encoded clips, with the same frames.
    """

    def __init__(
        self,
        frames: FrameArithmetic,
        max_length: int | None = None,
        heard: Mapping[AudioClip, Heard] | None = None,
        features: FeatureReader | None = None,
    ):
        self._frames = frames
        self._max_length = max_length
        self._heard = dict(heard or {})
        self._features = features
        self._missing: dict[AudioClip, MissingClip] = {}

    def lengths(self, clips: Sequence[AudioClip]) -> list[int]:
        """Samples at 16 kHz of each clip of a row, in their order; decodes clips that were not decoded before.

        Raises BadClipError, and TooLongError if the claimed or the true lengths, repetitions counted, exceed the limit.
        """
        if self._features is not None:
            self._look_up(self._features, [clip for clip in clips if clip not in self._heard])
        claimed = claimed_by_headers([clip for clip in clips if clip not in self._heard])
        seconds: list[float] = []
        for clip in clips:
            if clip not in self._heard:
                left = max(0.0, MAX_DIALOGUE_SECONDS - sum(seconds))
                self._heard[clip] = self._not_decoded(clip, claimed) or self._decode(clip, min(MAX_SECONDS, left))
            seconds.append(self._heard[clip].num_samples / SAMPLE_RATE)
            check_dialogue_seconds(seconds)
        return [self._heard[clip].num_samples for clip in clips]

    def heard(self, clip: AudioClip) -> Heard:
        """A clip that was given to `lengths` before."""
        return self._heard[clip]

    def _look_up(self, features: FeatureReader, clips: Sequence[AudioClip]) -> None:
        for clip in clips:
            if clip not in self._heard and clip not in self._missing:
                match features.find(clip):
                    case CachedClip(num_samples, windows, notes):
                        self._heard[clip] = Heard(num_samples, windows, notes)
                    case MissingClip() as missing:
                        self._missing[clip] = missing

    def _not_decoded(self, clip: AudioClip, claimed: dict[AudioClip, float]) -> Heard | None:
        if self._max_length is None or clip not in claimed:
            return None
        num_samples = round(claimed[clip] * SAMPLE_RATE)
        return Heard(num_samples, [], []) if self._frames.num_tokens(num_samples) > self._max_length else None

    def _decode(self, clip: AudioClip, at_most_s: float) -> Heard:
        notes: list[str] = []
        waveform = load_clip(clip, at_most_s=at_most_s, notes=notes)
        windows = clip_windows(waveform, self._frames)
        missing = self._missing.get(clip)
        if missing is not None and self._features is not None and self._features.key(clip) != missing.key:
            missing = MissingClip(None)  # the file has changed since it was hashed
        return Heard(len(waveform), windows, notes, missing)


def _is_large(clip: AudioClip) -> bool:
    if clip.sound is not None:
        return len(clip.sound.data) >= LARGE_FILE
    try:
        return os.stat(clip.path).st_size >= LARGE_FILE
    except OSError:
        return False  # decoding names the fault
