"""An audio part of a message: its clip, and the one place that reads a part and finds its faults."""

import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwhisper.data.audio import MAX_SECONDS, load_audio
from qwhisper.data.files import file_fault

# What a fault quotes of a file may be of any length and depth.
quoted = reprlib.Repr()
quoted.maxstring = quoted.maxother = 200


@dataclass(frozen=True)
class AudioClip:
    """A file or a stretch of one. `start` and `end` are seconds; None is the file's own edge.

    path: absolute and without a link in it (`os.path.realpath`): one that is there when it is read is refused.
    channel: the one to read, from 0; None reads them all.
    """

    path: str
    start: float | None = None
    end: float | None = None
    transcript: str | None = None
    channel: int | None = None


def load_clip(clip: AudioClip, *, at_most_s: float = MAX_SECONDS, notes: list[str] | None = None) -> np.ndarray:
    """The clip's sound as float32 [samples], mono, 16 kHz. Raises BadClipError as `load_audio` does.

    Also where its path, which was resolved when it was checked, has a link in it now.
    """
    return load_audio(
        clip.path,
        clip.start,
        clip.end,
        channel=clip.channel,
        follow_links=False,
        at_most_s=at_most_s,
        notes=notes,
    )


def parse_part(part: object, where: str, roots: list[Path], faults: list[str]) -> str | AudioClip:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if not isinstance(part, dict) or part.get("type") != "audio":
        example = "{'type': 'text', 'text': …} or {'type': 'audio', 'audio': …}"
        faults.append(f"{where}: neither a text nor an audio part; write {example}")
        return ""
    location = part.get("audio", part.get("path"))
    if not isinstance(location, str) or not location:
        faults.append(f"{where}: an audio placeholder without audio; give its file as `audio` or `path`")
        return ""
    start, end = part.get("start"), part.get("end")
    if not _is_stretch(start, end):
        stretch = f"start {quoted.repr(start)} and end {quoted.repr(end)}"
        faults.append(f"{where}: {stretch} must be seconds with 0 <= start < end")
    transcript = part.get("transcript")
    if transcript is not None and not isinstance(transcript, str):
        faults.append(f"{where}: `transcript` must be a text, not {type(transcript).__name__}")
    return AudioClip(resolve_path(location, where, roots, faults), start, end, transcript)


def _is_stretch(start: object, end: object) -> bool:
    edges = [0 if start is None else start, math.inf if end is None else end]
    if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges):
        return False
    return 0 <= edges[0] < edges[1] and end != math.inf  # type: ignore[operator]


def resolve_path(location: str, where: str, roots: list[Path], faults: list[str]) -> str:
    """The absolute path of an audio file; symbolic links are followed before it is asked where the file lies."""
    shown = quoted.repr(location)
    if "\0" in location:
        faults.append(f"{where}: {shown} holds a NUL, which no path can")
        return ""
    if location.rstrip().endswith("|"):
        faults.append(f"{where}: {shown} is a Kaldi pipe, and commands are never run: write the audio to a file")
        return ""
    path = os.path.realpath(roots[0] / location)
    if not any(Path(path).is_relative_to(os.path.realpath(root)) for root in roots):
        faults.append(f"{where}: {shown} lies outside {roots[-1]}: move it there or give --data_root")
    elif fault := file_fault(path):
        faults.append(f"{where}: audio file {shown} {fault} (looked at {quoted.repr(path)})")
    return path
