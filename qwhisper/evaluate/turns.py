"""Turns: the answers that a model is asked for, each with the messages before it, and their rows of tokens."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from qwhisper.data.dialogue import AudioClip, Dialogue, Message
from qwhisper.data.dialogue_audio import DialogueAudio, Heard
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import Rejection, read_in_order
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.rows import IGNORE, Sample
from qwhisper.errors import BadClipError, DataError
from qwhisper.frames import SAMPLE_RATE

KEPT_SAMPLES = 1800 * SAMPLE_RATE  # of decoded clips, 115 MB; beyond it only those in use stay in memory
WITH_WORKERS = 8  # groups decoded at a time, at least: their workers are started for them


@dataclass(frozen=True)
class Turn:
    """One answer to give: `dialogue.messages[index]`, asked by the messages before it."""

    dialogue: Dialogue
    index: int

    @property
    def answer(self) -> Message:
        return self.dialogue.messages[self.index]

    @property
    def reference(self) -> str:
        return self.answer.text

    @property
    def history(self) -> tuple[Message, ...]:
        return self.dialogue.messages[: self.index]

    @property
    def clips(self) -> tuple[AudioClip, ...]:
        return tuple(clip for message in self.history for clip in message.clips)


def turns_of(dialogues: Sequence[Dialogue]) -> list[Turn]:
    """Every answer to ask for, in their order: it follows a question, is not masked, and calls no tool."""
    return [
        Turn(dialogue, index)
        for dialogue in dialogues
        for index, message in enumerate(dialogue.messages)
        if index and message.is_answer and message.learned and not message.tool_calls
    ]


def answer_row(encoder: DialogueEncoder, turn: Turn, audio: DialogueAudio | None = None) -> Sample:
    """A turn as a row that ends with its answer; only the answer is supervised.

    audio: as `DialogueEncoder.encode` takes it. The answer's reasoning is left out, because the prompt is that of
    inference, which has none. Raises as `DialogueEncoder.encode` does.
    """
    messages = (*turn.history, replace(turn.answer, reasoning=None))
    row = encoder.encode(replace(turn.dialogue, messages=messages), audio)
    start, end = row.answer_spans[-1]
    labels = np.full_like(row.labels, IGNORE)
    labels[start:end] = row.input_ids[start:end]
    return replace(row, labels=labels, answer_spans=[(start, end)])


@dataclass(frozen=True, eq=False)
class _Clips:
    """Clips that are decoded together; id and source are those of a dialogue that has them."""

    id: str
    source: str
    clips: Sequence[AudioClip]


Decoded = dict[AudioClip, Heard | None]  # None: a bad clip


def first_whole(
    groups: Sequence[Sequence[Turn]],
    most: int,
    encoder: DialogueEncoder,
    heard: Decoded,
    num_workers: int = 0,
    poll: Poll = nothing,
) -> list[list[Sample]]:
    """The rows of the first `most` groups of turns that can be used and that the encoder does not cut, in their order.

    Decodes a clip once, however many rows have it, and not more groups than may still be needed, except with workers.
    heard: clips that were decoded before; gets those that are decoded now, and forgets unused ones beyond KEPT_SAMPLES.
    poll, and DataError: as in `read_in_order`.
    """
    whole: list[list[Sample]] = []
    used: set[AudioClip] = set()
    done = 0
    while done < len(groups) and len(whole) < most:
        missing = most - len(whole)
        lot = groups[done : done + max(missing, WITH_WORKERS if num_workers else 0)]
        done += len(lot)
        _decode(lot, encoder, heard, num_workers, poll)
        for turns in lot:
            rows = _whole_rows(turns, encoder, heard)
            if rows is not None:
                whole.append(rows)
                used.update(clip for turn in turns for clip in turn.clips)
        good = {clip: found.num_samples for clip, found in heard.items() if found is not None}
        if sum(good.values()) > KEPT_SAMPLES:
            for clip in good.keys() - used:
                del heard[clip]
    return whole[:most]


def _decode(
    groups: Sequence[Sequence[Turn]],
    encoder: DialogueEncoder,
    heard: Decoded,
    num_workers: int,
    poll: Poll,
) -> None:
    """Add the clips of the groups to `heard`. All clips of a turn that kills its reader are bad."""
    portions: list[_Clips] = []
    for turn in (turn for turns in groups for turn in turns):
        new = [clip for clip in dict.fromkeys(turn.clips) if clip not in heard]
        heard |= dict.fromkeys(new)
        if new:
            portions.append(_Clips(turn.dialogue.id, turn.dialogue.source, new))
    for (item,) in read_in_order(portions, encoder, num_workers, rows=_hear, chunk=1, poll=poll):
        if not isinstance(item, Rejection):
            heard |= dict(item)


def _hear(encoder: DialogueEncoder, portion: _Clips) -> list[tuple[AudioClip, Heard]]:
    """The clips of a portion that can be used, decoded."""
    audio = encoder.dialogue_audio()
    good: list[AudioClip] = []
    for clip in portion.clips:
        with suppress(BadClipError, MemoryError):
            audio.lengths([*good, clip])
            good.append(clip)
    return [(clip, audio.heard(clip)) for clip in good]


def _whole_rows(turns: Sequence[Turn], encoder: DialogueEncoder, heard: Decoded) -> list[Sample] | None:
    found = {clip: heard[clip] for turn in turns for clip in turn.clips}
    good = {clip: read for clip, read in found.items() if read is not None}
    if len(good) < len(found):
        return None
    audio = DialogueAudio(encoder.frames, encoder.max_length, good)
    try:
        rows = [answer_row(encoder, turn, audio) for turn in turns]
    except DataError:
        return None
    return None if any(row.events for row in rows) else rows
