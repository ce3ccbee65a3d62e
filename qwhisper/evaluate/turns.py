"""Turns: the answers that a model is asked for, each with the messages before it, and their rows of tokens."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwhisper.data.dialogue import AudioClip, Dialogue, Message
from qwhisper.data.dialogue_audio import DialogueAudio
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.loader import Rejection, read_in_order
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.rows import IGNORE, Sample


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
class _Group:
    """Turns that are read together; id and source are those of the first one's dialogue."""

    turns: Sequence[Turn]

    @property
    def id(self) -> str:
        return self.turns[0].dialogue.id

    @property
    def source(self) -> str:
        return self.turns[0].dialogue.source


def answer_rows(
    groups: Sequence[Sequence[Turn]], encoder: DialogueEncoder, num_workers: int = 0, poll: Poll = nothing
) -> Generator[list[Sample] | None]:
    """The rows of each group of turns, in their order; None for a group with a turn that can't be used.

    Reads groups as they are consumed, with workers a few ahead. poll, and DataError: as in `read_in_order`.
    """
    grouped = [_Group(turns) for turns in groups]
    for (item,) in read_in_order(grouped, encoder, num_workers, rows=_rows, chunk=1, poll=poll):
        yield None if isinstance(item, Rejection) else item


def _rows(encoder: DialogueEncoder, group: _Group) -> list[Sample]:
    return [answer_row(encoder, turn) for turn in group.turns]
