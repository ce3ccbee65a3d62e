"""Writes dialogues in memory to files from which a run can be restarted: JSONL, and audio files for arrays and bytes.

The name of each file holds a digest of its content: equal dialogues make equal files, and nothing is overwritten.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import soundfile

from qwhisper import disk
from qwhisper.data.clips import AudioClip, own_roots
from qwhisper.data.dialogue import Dialogue, parse_records, refuse, to_record, unused_notes
from qwhisper.data.records import parse_line
from qwhisper.data.waveform import Sound
from qwhisper.errors import DataError, DiskError

AUDIO_FOLDER = "audio"
# An array is an AU file in memory, see waveform.py. WAV holds the same samples, more programs play it, and its length
# is known without decoding it.
WAV_DTYPES = {"PCM_16": "int16", "PCM_32": "int32", "FLOAT": "float32"}
SUFFIXES = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b".snd": ".au"}


@dataclass(frozen=True)
class DialoguesInMemory:
    """Dialogues that were checked, and the file that `write` makes of them.

    path: of the file. folders: of audio files, which stay where they are. sounds: names of the files of sound in
    memory. notes: what a user should know.
    """

    path: Path
    folders: frozenset[str]
    sounds: frozenset[str]
    notes: list[str]
    text: str
    records: Iterable[Mapping]

    @classmethod
    def check(
        cls, records: Iterable[Mapping], folder: Path, name: str, *, data_root: str | Path | None = None
    ) -> "DialoguesInMemory":
        """records: canonical dialogues, audio as a path, an array or bytes; read here and, if `records` has a length,
        again in `write`, so that no sound is kept in between. folder, name: of the file, NAME-DIGEST.jsonl.

        Relative paths start in the current folder; with `data_root`, files must lie there or below it. Raises
        DataError with all faults, each with the number of its dialogue, from 1.
        """
        given = records if isinstance(records, Sized) else list(records)
        faults: list[str] = []
        stored: list[Dialogue] = []
        lines: list[str] = []
        folders: set[str] = set()
        sounds: set[str] = set()
        for dialogue in _read(given, name, data_root, faults):
            folders |= {os.path.dirname(clip.path) for clip in dialogue.clips if clip.sound is None}
            sounds |= {_sound_file(clip.sound, folder).name for clip in dialogue.clips if clip.sound is not None}
            stored.append(_with_files(dialogue, folder))
            record = to_record(stored[-1], folder)
            if isinstance(fault := parse_line(json.dumps(record).encode(), "utf-8"), str):
                faults.append(f"{dialogue.source}: {fault}")
            else:
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        refuse(faults, "fix these first")
        if not lines:
            raise DataError(f"{name}: no dialogue in it")
        text = "".join(lines)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        path, notes = folder / f"{name}-{digest}.jsonl", unused_notes(stored)
        return cls(path, frozenset(folders), frozenset(sounds), notes, text, given)

    def write(self) -> None:
        """Make the file and those of its audio. Raises DiskError, and DataError if `records` no longer holds them."""
        folder = self.path.parent
        name = self.path.name.rpartition("-")[0]
        try:
            (folder / AUDIO_FOLDER).mkdir(parents=True, exist_ok=True)
            found: set[str] = set()
            for dialogue in _read(self.records, name, os.sep, []):  # where files may lie was checked
                for clip in dialogue.clips:
                    if clip.sound is not None and (file := _sound_file(clip.sound, folder)).name in self.sounds:
                        found.add(file.name)
                        _write_sound(clip.sound, folder)
            if missing := self.sounds - found:
                raise DataError(
                    f"{name}: {len(missing)} of {len(self.sounds)} sounds were not there when the dialogues were read "
                    "a second time: an iterator with a length, or audio drawn anew each time; give a list"
                )
            disk.write_whole(self.path, self.text)
        except OSError as error:
            raise DiskError(f"{folder}: can't be written ({error}): make room, or give another folder") from error


def _read(records: Iterable[Mapping], name: str, data_root: str | Path | None, faults: list[str]) -> Iterator[Dialogue]:
    current, everywhere = own_roots()
    numbered = ((f"{name}:{n}", _plain(record)) for n, record in enumerate(records, 1))
    return parse_records(numbered, current, data_root or everywhere, faults)


def _plain(record: object) -> dict | str:
    if isinstance(record, Mapping):
        return dict(record)
    return f"a dialogue must be a dict with `messages`, not {type(record).__name__}"


def _with_files(dialogue: Dialogue, folder: Path) -> Dialogue:
    """The dialogue with its sounds in memory replaced by the files that `write` makes."""

    def part(given: str | AudioClip) -> str | AudioClip:
        if isinstance(given, str) or given.sound is None:
            return given
        return replace(given, path=os.path.realpath(_sound_file(given.sound, folder)), sound=None)

    messages = [replace(message, content=tuple(map(part, message.content))) for message in dialogue.messages]
    return replace(dialogue, messages=tuple(messages))


def _sound_file(sound: Sound, folder: Path) -> Path:
    suffix = ".wav" if _wav_dtype(sound) else SUFFIXES.get(sound.data[:4], "")
    return folder / AUDIO_FOLDER / f"{sound.digest}{suffix}"


def _wav_dtype(sound: Sound) -> str | None:
    """The sample type with which WAV holds the samples of an AU file unchanged; None for any other file."""
    if not sound.data.startswith(b".snd"):
        return None
    try:
        return WAV_DTYPES.get(soundfile.info(io.BytesIO(sound.data)).subtype)
    except soundfile.LibsndfileError:  # the reader of audio names the fault
        return None


def _write_sound(sound: Sound, folder: Path) -> None:
    file = _sound_file(sound, folder)
    if file.exists():
        return
    aside = file.with_name(f".{file.name}{disk.WRITING}")
    dtype = _wav_dtype(sound)
    if dtype is None:
        aside.write_bytes(sound.data)
    else:
        samples, rate = soundfile.read(io.BytesIO(sound.data), dtype=dtype, always_2d=True)
        subtype = next(subtype for subtype, name in WAV_DTYPES.items() if name == dtype)
        soundfile.write(aside, samples, rate, subtype=subtype, format="WAV")
    disk.flush(aside)
    aside.replace(file)
