"""Turns: the answers that a model is asked for, each with what is said before it, and their rows of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwhisper.data.dialogue import AudioClip, Dialogue, Message
from qwhisper.data.encode import DialogueEncoder
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


def answer_row(encoder: DialogueEncoder, turn: Turn) -> Sample:
    """A turn as a row that ends with its answer, which alone is supervised.

    The answer's reasoning is left out: the prompt is the one that is served, which has no place for it. Raises as
    `DialogueEncoder.encode` does.
    """
    messages = (*turn.history, replace(turn.answer, reasoning=None))
    row = encoder.encode(replace(turn.dialogue, messages=messages))
    start, end = row.answer_spans[-1]
    labels = np.full_like(row.labels, IGNORE)
    labels[start:end] = row.input_ids[start:end]
    return replace(row, labels=labels, answer_spans=[(start, end)])
