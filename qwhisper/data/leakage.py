"""Finds evaluation data that is training data. Reports; refuses nothing.

Audio is the same if both clips are of one file and overlap, even if the file has another name: files of equal size are
compared by their bytes. The same recording in another format, or cut differently, is not recognised.
"""

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import Dialogue
from qwhisper.data.waveform import sound_of_bytes
from qwhisper.disk import file_sha256

OVERLAP = 0.5  # of the shorter clip; neighbouring sentences overlap less, by the margins around them
MAX_FILES_READ = 20_000  # of the training data that are compared by their bytes; a few minutes on a slow disk


def notes(
    eval_file: str | Path, held_out: Sequence[Dialogue], train_file: str | Path, trained: Sequence[Dialogue]
) -> list[str]:
    """One sentence for each thing that the evaluation data shares with the training data; empty if nothing."""
    if same_file(eval_file, train_file):
        return [f"{eval_file} is the training data: its scores say what was learned by heart"]
    return overlap_notes(held_out, trained)


def same_file(a: str | Path, b: str | Path) -> bool:
    """Whether both names lead to one file, or to files of the same bytes."""
    if os.path.realpath(a) == os.path.realpath(b):
        return True
    try:
        return os.path.getsize(a) == os.path.getsize(b) and file_sha256(a) == file_sha256(b)
    except OSError:
        return False


def overlap_notes(held_out: Sequence[Dialogue], trained: Sequence[Dialogue]) -> list[str]:
    """One sentence each for whole dialogues, for audio and for ids that are in both; empty if there are none.

    A dialogue counts once, for the first of these that applies. An id of digits only is ignored: it is a number within
    its own file.
    """
    training = _Training(trained, held_out)
    found: dict[str, list[str]] = {"dialogue": [], "audio": [], "id": []}
    for dialogue in held_out:
        for kind, place in training.places(dialogue):
            found[kind].append(f"{dialogue.source} ({place})")
            break
    sentences = {
        "dialogue": "are in the training data as they are",
        "audio": "have audio that is in the training data",
        "id": "have an id that another dialogue of the training data has too",
    }
    notes = [
        f"{len(places)} of {len(held_out)} held-out dialogues {sentences[kind]}, the first: {places[0]}"
        for kind, places in found.items()
        if places
    ]
    return notes + ([training.unread] if training.unread else [])


class _Training:
    """Indexes of the training data for comparison with held-out dialogues. unread: what was not compared, or None."""

    def __init__(self, trained: Sequence[Dialogue], held_out: Sequence[Dialogue]):
        self.unread: str | None = None
        self._trained = trained
        self._names = self._names_of_the_same_bytes(_recordings(held_out), _recordings(trained))
        self._clips: dict[str, list[tuple[AudioClip, str]]] = defaultdict(list)
        for dialogue in trained:
            for clip in dialogue.clips:
                self._clips[_name(clip)].append((clip, dialogue.source))

    @cached_property
    def _dialogues(self) -> dict[Hashable, str]:
        return {_content(dialogue, {}): dialogue.source for dialogue in self._trained}

    @cached_property
    def _ids(self) -> dict[str, str]:
        return {c.id: c.source for c in self._trained if c.id != c.source and not c.id.isdigit()}

    def places(self, dialogue: Dialogue) -> Iterable[tuple[str, str]]:
        """What is shared, and its place in the training data."""
        content = _content(dialogue, self._names)
        if content in self._dialogues:
            yield "dialogue", self._dialogues[content]
        for clip in dialogue.clips:
            name = self._names.get(_name(clip), _name(clip))
            for other, source in self._clips.get(name, ()):
                if overlap(clip, other):
                    yield "audio", f"{Path(_name(clip)).name} is {Path(name).name} of {source}"
        if dialogue.id in self._ids:
            yield "id", f"id {dialogue.id!r}, {self._ids[dialogue.id]}"

    def _names_of_the_same_bytes(self, held_out: dict[str, AudioClip], trained: dict[str, AudioClip]) -> dict[str, str]:
        """{name of a held-out recording: the other name that it has in the training data}."""
        others: dict[int, list[AudioClip]] = defaultdict(list)
        for name, clip in held_out.items():
            if name not in trained:
                others[_size(clip)].append(clip)
        alike = [clip for clip in trained.values() if _size(clip) in others]
        if len(alike) > MAX_FILES_READ:
            self.unread = (
                f"only {MAX_FILES_READ} of {len(alike)} training files were compared by their bytes with held-out "
                "files of the same size and another name"
            )
        names: dict[str, str] = {}
        for clip in alike[:MAX_FILES_READ]:
            names.setdefault(_digest(clip), _name(clip))
        found = {_name(clip): names.get(_digest(clip)) for clips in others.values() for clip in clips}
        return {name: other for name, other in found.items() if other is not None}


def overlap(a: AudioClip, b: AudioClip) -> bool:
    """Whether two clips of one file share at least half of the shorter one."""
    if a.channel != b.channel and None not in (a.channel, b.channel):
        return False
    (start, end), (other_start, other_end) = (
        (clip.start or 0.0, float("inf") if clip.end is None else clip.end) for clip in (a, b)
    )
    shared = min(end, other_end) - max(start, other_start)
    return shared > 0 and shared >= OVERLAP * min(end - start, other_end - other_start)


def _recordings(dialogues: Iterable[Dialogue]) -> dict[str, AudioClip]:
    """One clip of each file, and of each sound in memory, by its name."""
    return {_name(clip): clip for dialogue in dialogues for clip in dialogue.clips}


def _name(clip: AudioClip) -> str:
    return clip.path if clip.sound is None else clip.sound.digest


def _content(dialogue: Dialogue, names: Mapping[str, str]) -> Hashable:
    """The content of a dialogue, for comparison; `names`: other names for some recordings."""

    def part_content(part: str | AudioClip) -> Hashable:
        if isinstance(part, str):
            return part.strip()
        return names.get(_name(part), _name(part)), part.start, part.end, part.channel

    return tuple((message.role, tuple(map(part_content, message.content))) for message in dialogue.messages)


def _size(clip: AudioClip) -> int:
    try:
        return os.path.getsize(clip.path) if clip.sound is None else len(clip.sound.data)
    except OSError:
        return -1  # deleted since it was read


def _digest(clip: AudioClip) -> str:
    try:
        return sound_of_bytes(Path(clip.path).read_bytes(), "").digest if clip.sound is None else clip.sound.digest
    except (OSError, ValueError):  # deleted or empty: equal to no other
        return _name(clip)
