"""The audio of one dialogue: each clip decoded once, and no more of it than memory may hold.

What a dialogue's clips claim is added up before the first of them is decoded, and what they have is while they are:
eight references to a clip of four hours are a short line of JSON.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwhisper.data.audio import MAX_SECONDS, TooLongError, claimed_seconds
from qwhisper.data.clips import AudioClip, load_clip
from qwhisper.data.windows import clip_windows
from qwhisper.frames import SAMPLE_RATE, FrameArithmetic

MAX_DIALOGUE_SECONDS = 2 * 3600  # 0.5 GB of waveform, as much again in windows, 90,000 tokens at 12.5 a second
LARGE_FILE = 2**20  # bytes; smaller files are decoded without asking their headers first: 17 minutes at 8 kbit/s


@dataclass(frozen=True, eq=False)
class Heard:
    """A clip's windows, float32 [samples] each, and the tokens of each; how it was read, where a user should know.

    num_tokens: of the clip, also where it was not decoded.
    """

    num_tokens: int
    windows: list[np.ndarray]
    window_tokens: list[int]
    seconds: float
    notes: list[str]


def claimed_by_headers(clips: Sequence[AudioClip]) -> dict[AudioClip, float]:
    """Seconds that the headers of large files claim. Raises TooLongError where a dialogue may not have that much."""
    large = {clip for clip in clips if _is_large(clip)}
    claimed = {clip: claimed_seconds(clip.source, clip.start, clip.end, follow_links=False) for clip in large}
    check_dialogue_seconds([claimed.get(clip, 0.0) for clip in clips])
    return claimed


def check_dialogue_seconds(seconds: Sequence[float]) -> None:
    """Raises TooLongError where the clips of a dialogue, of so many seconds, are more than one may have."""
    if sum(seconds) > MAX_DIALOGUE_SECONDS:
        raise TooLongError(
            f"{sum(seconds):.5g} s of audio in {len(seconds)} clips, and a dialogue may have {MAX_DIALOGUE_SECONDS}: "
            "divide it, or choose stretches with `start` and `end`"
        )


class DialogueAudio:
    """Reads the clips of a dialogue. max_length: tokens of a row; a clip that is longer by itself is not decoded.

    Raises TooLongError where the headers of the clips claim more than MAX_DIALOGUE_SECONDS.
    """

    def __init__(self, clips: Sequence[AudioClip], frames: FrameArithmetic, max_length: int | None = None):
        self._frames = frames
        self._max_length = max_length
        self._claimed = claimed_by_headers(clips)
        self._seconds: list[float] = []
        self._heard: dict[AudioClip, Heard] = {}

    def hear(self, clip: AudioClip) -> Heard:
        """The clip; one that was heard before shares its windows. Raises BadClipError."""
        heard = self._heard.get(clip) or self._not_decoded(clip) or self._decode(clip)
        self._heard[clip] = heard
        self._seconds.append(heard.seconds)
        check_dialogue_seconds(self._seconds)
        return heard

    def _not_decoded(self, clip: AudioClip) -> Heard | None:
        if self._max_length is None or clip not in self._claimed:
            return None
        tokens = self._frames.num_tokens(round(self._claimed[clip] * SAMPLE_RATE))
        return Heard(tokens, [], [], self._claimed[clip], []) if tokens > self._max_length else None

    def _decode(self, clip: AudioClip) -> Heard:
        notes: list[str] = []
        left = max(0.0, MAX_DIALOGUE_SECONDS - sum(self._seconds))
        waveform = load_clip(clip, at_most_s=min(MAX_SECONDS, left), notes=notes)
        windows = clip_windows(waveform, self._frames)
        tokens = [self._frames.window_tokens(len(window)) for window in windows]
        said = [f"{clip.name}: {note}" for note in notes]
        return Heard(sum(tokens), windows, tokens, len(waveform) / SAMPLE_RATE, said)


def _is_large(clip: AudioClip) -> bool:
    if clip.sound is not None:
        return len(clip.sound.data) >= LARGE_FILE
    try:
        return os.stat(clip.path).st_size >= LARGE_FILE
    except OSError:
        return False  # decoding names the fault
