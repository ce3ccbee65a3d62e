"""A part of a message's content: its clip, and the one place that reads a part and finds its faults.

DialogueEncoder, processor, chat and the files of dialogues read parts here. The forms are those of transformers,
OpenAI, Qwen, vLLM and Hugging Face datasets:

    "text"                                                          {"type": "text" | "input_text", "text": "…"}
    {"type": "audio", "audio" | "path" | "url" | "audio_url": "clip.wav" | "file:///clip.wav" | "data:…;base64,…"}
    {"type": "audio_url", "audio_url": {"url": "…"}}                {"type": "audio_url", "audio_url": "…"}
    {"type": "input_audio", "input_audio": {"data": "base64"}}      {"type": "input_audio", "input_audio": "…"}
    {"type": "audio", "audio": array, "sampling_rate": 8000}        {"type": "audio", "audio": (array, 8000)}
    {"type": "audio", "audio": {"array": …, "sampling_rate": …}}    {"type": "audio", "audio": {"bytes": …, "path": …}}

`type` may be missing if another key implies it. A stretch is `start` and `end`, Qwen's `audio_start` and `audio_end`,
or `offset` and `duration`, in seconds; `channel` counts from 0. A key whose value is None counts as absent.
"""

import io
import math
import numbers
import os
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import unquote

import numpy as np

from qwhisper.data.audio import MAX_SECONDS, load_audio
from qwhisper.data.files import file_fault
from qwhisper.data.keys import IN_PART, unknown_keys
from qwhisper.data.waveform import (
    Sound,
    is_array,
    is_base64,
    is_data_url,
    plain_scalar,
    samples_and_rate,
    sound_of_array,
    sound_of_base64,
    sound_of_bytes,
    whole_rate,
)
from qwhisper.errors import BadClipError, DataError
from qwhisper.frames import SAMPLE_RATE

# A fault quotes values of a file, which may have any length and depth.
quoted = reprlib.Repr()
quoted.maxstring = quoted.maxother = 200

TEXT_TYPES = ("text", "input_text", "output_text")
AUDIO_TYPES = ("audio", "audio_url", "input_audio")
ARRAYS = ("array", "raw")
ENCODED = ("base64", "data", "bytes")  # a text under these keys is base64, never a path
SOURCES = ("audio", "path", "url", "audio_url", "input_audio", *ARRAYS, *ENCODED)
RATES = ("sampling_rate", "sample_rate", "sr")
STRETCHES = (("start", "end"), ("audio_start", "audio_end"), ("offset", "duration"))
CHANNELS = ("channel", "channel_selector")
AUDIO_KEYS = (*SOURCES, *RATES, *(key for pair in STRETCHES for key in pair), *CHANNELS, "transcript")
KNOWN_KEYS = ("type", "text", "format", *AUDIO_KEYS)
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class AudioClip:
    """A file, or sound in memory, or a stretch of either. `start` and `end` are seconds; None is the sound's own edge.

    path: absolute and without links (`os.path.realpath`); a link that is found there when it is read is refused. "" if
    `sound` is given. channel: the channel to read, from 0; None reads all of them.
    """

    path: str
    start: float | None = None
    end: float | None = None
    transcript: str | None = None
    channel: int | None = None
    sound: Sound | None = None

    @property
    def name(self) -> str:
        """Its name in errors: the path, or where the sound was given, as in "message 1, part 2, `audio`"."""
        return self.path if self.sound is None else self.sound.name

    @property
    def source(self) -> str | bytes:
        """The source to give to `load_audio`."""
        return self.path if self.sound is None else self.sound.data


def load_clip(clip: AudioClip, *, at_most_s: float = MAX_SECONDS, notes: list[str] | None = None) -> np.ndarray:
    """The clip's sound as float32 [samples], mono, 16 kHz. Raises BadClipError as `load_audio` does.

    Also raises it if the path, which was resolved when it was checked, has a link in it now.
    """
    try:
        return load_audio(
            clip.source,
            clip.start,
            clip.end,
            channel=clip.channel,
            follow_links=False,
            at_most_s=at_most_s,
            notes=notes,
        )
    except BadClipError as error:
        if clip.sound is None:
            raise
        raise type(error)(f"{clip.name}: {error}") from error


def own_roots() -> list[Path]:
    """The roots of paths from Python or the command line: relative to the current folder, leading anywhere."""
    folder = Path.cwd()
    return [folder, Path(folder.anchor)]


def raise_or_warn(faults: list[str], unused: Iterable[str]) -> None:
    """Report the findings in a caller's own input: DataError for faults, a warning for unused keys."""
    if faults:
        raise DataError("\n".join(faults))
    if names := ", ".join(sorted(set(unused))):
        warnings.warn(f"not used: {names}", stacklevel=3)


def is_list(value: object) -> TypeGuard[Sequence]:
    """Whether a value is a list of messages, parts or clips: pandas turns lists of a file into arrays of objects."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object)


def parse_content(
    content: object, where: str, roots: list[Path], faults: list[str], unused: list[str], rate: int = SAMPLE_RATE
) -> tuple[str | AudioClip, ...]:
    """The parts of a message's content; see `parse_part`."""
    if isinstance(content, str):
        return (content,)
    if not is_list(content):
        faults.append(f"{where}: `content` must be a text or a list of parts, not {type(content).__name__}")
        return ()
    return tuple(
        parse_part(part, f"{where}, part {n}", roots, faults, unused, rate) for n, part in enumerate(content, 1)
    )


def parse_part(
    part: object, where: str, roots: list[Path], faults: list[str], unused: list[str], rate: int = SAMPLE_RATE
) -> str | AudioClip:
    """Read a part: a text or a clip.

    roots: relative paths start at the first; a file must lie below one of them. faults: takes a sentence for each fault
    of the part. unused: takes the keys without effect here. rate: the sampling rate of an array given without one.
    """
    if isinstance(part, str | AudioClip):
        return part
    given = _keys_with_values(part) if isinstance(part, Mapping) else {}
    kind = given.get("type", _type_of(given))
    try:
        if isinstance(kind, str) and kind in AUDIO_TYPES:
            given = _flattened(given)
        elif not isinstance(kind, str) or kind not in TEXT_TYPES:
            found = f"type {quoted.repr(kind)}" if isinstance(part, Mapping) else type(part).__name__
            example = "{'type': 'text', 'text': …} or {'type': 'audio', 'audio': …}"
            raise ValueError(f"neither a text nor an audio part ({found}); write {example}")
        misspelled, rest = unknown_keys(given, KNOWN_KEYS, where, IN_PART)
        faults += misspelled
        unused += [f"`{key}` in a part" for key in rest]
        return _parse_text(given) if kind in TEXT_TYPES else _parse_clip(given, where, roots, faults, unused, rate)
    except ValueError as error:
        faults.append(f"{where}: {error}")
        return ""


def parse_audio(
    value: object, where: str, roots: list[Path], faults: list[str], unused: list[str], rate: int = SAMPLE_RATE
) -> AudioClip:
    """Read a clip outside of a part, as in a list of `audios`: a value of `audio` in a part, or an audio part."""
    if isinstance(value, AudioClip):
        return value
    given = dict(value) if isinstance(value, Mapping) else {"audio": value}
    clip = parse_part(given | {"type": "audio"}, where, roots, faults, unused, rate)
    return clip if isinstance(clip, AudioClip) else AudioClip("")  # there is a fault


def read_own_audio(value: object, where: str, rate: int = SAMPLE_RATE) -> AudioClip:
    """Read a clip that a caller gives directly: relative paths start in the current folder, and any file may be read.

    Raises DataError.
    """
    faults: list[str] = []
    unused: list[str] = []
    clip = parse_audio(value, where, own_roots(), faults, unused, rate)
    raise_or_warn(faults, unused)
    return clip


def _keys_with_values(part: Mapping) -> dict[str, Any]:
    """The part without None values, which Hugging Face datasets gives to keys that only other parts have."""
    return {str(key): value for key, value in part.items() if value is not None}


def _type_of(given: dict[str, Any]) -> str | None:
    """The type of a part without `type`."""
    if "text" in given:
        return "text"
    return "audio" if any(key in given for key in SOURCES) else None


def _parse_text(given: dict[str, Any]) -> str:
    if misplaced := [key for key in given if key in AUDIO_KEYS]:
        raise ValueError(f"`{misplaced[0]}` in a text part; write an audio part beside it, {{'type': 'audio', …}}")
    text = given.get("text")
    if not isinstance(text, str):
        raise ValueError(f"`text` must be a text, not {type(text).__name__}")
    return text


def _parse_clip(
    given: dict[str, Any], where: str, roots: list[Path], faults: list[str], unused: list[str], rate: int
) -> AudioClip:
    if "text" in given:
        raise ValueError("`text` in an audio part; write `transcript`, or a text part beside it")
    start, end = _parse_stretch(given)
    transcript = given.get("transcript")
    if transcript is not None and not isinstance(transcript, str):
        raise ValueError(f"`transcript` must be a text, not {type(transcript).__name__}")
    channel = _parse_channel(given)
    key = _source_key(given)
    if not is_array(given[key]):  # a file states its own rate
        unused += [f"`{name}` in a part" for name in RATES if name in given]
    try:
        source = _read_source(key, given, where, roots, faults, rate)
    except ValueError as error:
        raise ValueError(f"`{key}` {error}") from error
    path, sound = ("", source) if isinstance(source, Sound) else (source, None)
    return AudioClip(path, start, end, transcript, channel, sound)


def _flattened(given: dict[str, Any]) -> dict[str, Any]:
    """A part with the keys of the object under its source beside its own, as in {"audio": {"array": …}}."""
    key = next((key for key in SOURCES if isinstance(given.get(key), Mapping)), None)
    if key is None:
        return given
    inner = _keys_with_values(given[key])
    outer = {name: value for name, value in given.items() if name != key}
    if twice := [name for name in inner if name in outer]:
        raise ValueError(f"`{twice[0]}` is given both beside `{key}` and inside it; give it once")
    if not any(name in inner and not isinstance(inner[name], Mapping) for name in SOURCES):
        raise ValueError(f"`{key}` is an object without audio; give a path, {{'url': …}} or {{'array': …}}")
    return outer | inner


def _source_key(given: dict[str, Any]) -> str:
    named = [key for key in SOURCES if key in given]
    if "path" in named and any(key in named for key in ("bytes", *ARRAYS)):
        named.remove("path")  # datasets' Audio: the name of the file that the sound was taken from
    if len(named) > 1:
        raise ValueError(f"`{named[0]}` and `{named[1]}` are two sources of audio; give one, or write two parts")
    if not named or (isinstance(given[named[0]], str) and not given[named[0]]):
        raise ValueError("an audio placeholder without audio; give its file as `audio` or `path`")
    return named[0]


def _read_source(
    key: str, given: dict[str, Any], where: str, roots: list[Path], faults: list[str], rate: int
) -> str | Sound:
    """The absolute path, or the sound in memory."""
    value, name = given[key], f"{where}, `{key}`"
    if is_array(value):
        samples, own_rate = samples_and_rate(value)
        rates = [given[k] for k in RATES if k in given] + ([] if own_rate is None else [own_rate])
        stated = {whole_rate(stated) for stated in rates}
        if len(stated) > 1:
            raise ValueError(f"has two sampling rates, {' and '.join(map(str, sorted(stated)))}; give one")
        return sound_of_array(samples, next(iter(stated), rate), name)
    if isinstance(value, io.BytesIO):
        value = value.getvalue()
    if isinstance(value, bytes | bytearray | memoryview):
        return sound_of_bytes(value, name)
    if isinstance(value, os.PathLike):
        return resolve_path(os.fsdecode(value), where, roots, faults)
    if not isinstance(value, str):
        raise ValueError(f"is of type {type(value).__name__}; give a path, a data URL, bytes or an array")
    if is_data_url(value) or (key in ENCODED and not URL.match(value)) or is_base64(value):
        return sound_of_base64(value, name)
    return resolve_path(value, where, roots, faults)


def _parse_stretch(given: dict[str, Any]) -> tuple[float | None, float | None]:
    pairs = [pair for pair in STRETCHES if any(key in given for key in pair)]
    if not pairs:
        return None, None
    if len(pairs) > 1:
        said = ", ".join(f"`{key}`" for pair in pairs for key in pair if key in given)
        raise ValueError(f"{said} give the stretch twice; give `start` and `end`, or `offset` and `duration`")
    names = pairs[0]
    first, second = (None if given.get(name) is None else _seconds(given[name]) for name in names)
    start, by_length = first or 0.0, names == ("offset", "duration")
    end = None if second is None else start + second if by_length else second
    if not is_stretch(start, end):
        stretch = " and ".join(f"{name} {quoted.repr(given.get(name))}" for name in names)
        rule = "0 <= offset and 0 < duration" if by_length else f"0 <= {names[0]} < {names[1]}"
        raise ValueError(f"{stretch} must be seconds with {rule}")
    return first, end


def is_stretch(start: float, end: float | None) -> bool:
    return 0 <= start < (math.inf if end is None else end) and end != math.inf


def _seconds(value: object) -> float:
    """A Python or numpy number as float; NaN, for which every comparison is false, for anything else."""
    value = plain_scalar(value)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _parse_channel(given: dict[str, Any]) -> int | None:
    named = [key for key in CHANNELS if key in given]
    if not named:
        return None
    value = plain_scalar(given[named[-1]])
    if len(named) > 1 or not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"`{named[-1]}` must be one whole number, from 0, not {quoted.repr(value)}")
    return int(value)


def resolve_path(location: str, where: str, roots: list[Path], faults: list[str]) -> str:
    """The absolute path of an audio file; symbolic links are resolved before the check of where the file lies."""
    shown = quoted.repr(location)
    if scheme := URL.match(location):
        if scheme[1].lower() != "file":
            faults.append(
                f"{where}: {shown} is not a local file, and nothing is downloaded: download it and give its path"
            )
            return ""
        location = unquote(location[len("file://") :])
        location = location.removeprefix("localhost") if location.startswith("localhost/") else location
    if "\0" in location:
        faults.append(f"{where}: {shown} holds a NUL character, which a path can't contain")
        return ""
    if location.rstrip().endswith("|"):
        faults.append(f"{where}: {shown} is a Kaldi pipe, and commands are never run: write the audio to a file")
        return ""
    path = os.path.realpath(roots[0] / location)
    if not any(Path(path).is_relative_to(os.path.realpath(root)) for root in roots):
        faults.append(f"{where}: {shown} lies outside {os.path.realpath(roots[-1])}: move it there or give --data_root")
    elif fault := file_fault(path):
        faults.append(f"{where}: audio file {shown} {fault} (looked at {quoted.repr(path)})")
    return path
