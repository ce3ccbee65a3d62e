"""A row of tokens: how the parts of a dialogue are joined and cut to fit; `Layout`, the row without its audio, and
`Sample`, the row as training takes it.

The place of each answer follows from the pieces of the rendered dialogue; no text is ever searched.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import Dialogue
from qwhisper.data.feature_store import EncodedWindow
from qwhisper.data.features import MissingClip
from qwhisper.data.messages import Message
from qwhisper.data.template import Piece
from qwhisper.errors import BadClipError

IGNORE = -100  # label of a position without a loss


@dataclass(frozen=True)
class ClipSlot:
    """A clip's place in a row: its first placeholder, and the samples at 16 kHz that its placeholders stand for."""

    clip: AudioClip
    start: int
    num_samples: int


@dataclass(frozen=True)
class RowSource:
    """The input of a row, so that it can be laid out again.

    supervised: message indices of the answers to learn; first_own: the first message whose text counts; events: what
    was left out of the dialogue before.
    """

    dialogue: Dialogue
    supervised: frozenset[int]
    first_own: int = 0
    events: tuple[str, ...] = ()


@dataclass(eq=False)
class Layout:
    """One training row without its audio: like `Sample`, with clip slots, in order, instead of windows."""

    made_of: RowSource
    input_ids: np.ndarray
    labels: np.ndarray
    slots: list[ClipSlot]
    answer_spans: list[tuple[int, int]]
    events: list[str]
    teacher: "Layout | None" = None

    @property
    def num_supervised(self) -> int:
        """Number of positions with a loss, after the shift by one."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def audio_samples(self) -> int:
        """Samples at 16 kHz of all its clips, repetitions included."""
        return sum(slot.num_samples for slot in self.slots)


@dataclass(frozen=True, eq=False)
class Uncached:
    """A clip of a sample that was not found in the feature cache. first, count: its windows; the rest as in `Heard`."""

    missing: MissingClip
    name: str
    first: int
    count: int
    num_samples: int
    notes: list[str]


@dataclass(eq=False)
class Sample:
    """One training row.

    input_ids, labels: int64 [tokens], labels unshifted with -100 where nothing is learned. windows: float32 [samples]
    each, or their cached features, in the order of their placeholders. answer_spans: (start, end) of every supervised
    answer with the token that ends its turn; the tokens before start are the generation prompt at that turn. events:
    what was cut or left out. notes: for the user, on how its audio was read. teacher: the same dialogue in words, with
    the same tokens supervised in the same order, or None. uncached: with a feature cache, the clips to encode.
    """

    id: str
    source: str
    input_ids: np.ndarray
    labels: np.ndarray
    windows: list[np.ndarray | EncodedWindow] = field(default_factory=list)
    answer_spans: list[tuple[int, int]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    teacher: "Sample | None" = None
    uncached: list[Uncached] = field(default_factory=list)

    @property
    def targets(self) -> np.ndarray:
        """The supervised tokens, in order."""
        return self.labels[1:][self.labels[1:] != IGNORE]

    @property
    def num_supervised(self) -> int:
        """Number of positions with a loss, after the shift by one."""
        return len(self.targets)


@dataclass(eq=False)
class Part:
    """A piece with its tokens; an audio piece has its length in samples at 16 kHz."""

    piece: Piece
    ids: list[int]
    num_samples: int = 0


@dataclass(eq=False)
class Row:
    """Parts joined: tokens, where each assistant message's answer stands, where user text and clips stand."""

    input_ids: list[int]
    answers: dict[int, tuple[int, int]]  # message index -> (start, end with the end-of-turn token)
    texts: list[tuple[int, int, int]]  # (message index, start, end) of the text pieces
    slots: list[ClipSlot]


def join_parts(parts: Sequence[Part], messages: Sequence[Message], added_ids: set[int]) -> Row:
    """Put parts end to end; an assistant's answer, tool calls included, ends with the first added token of the scaffold
    after it.
    """
    row = Row([], {}, [], [])
    open_answer = None
    for part in parts:
        index, start = part.piece.message_index, len(row.input_ids)
        row.input_ids += part.ids
        end = len(row.input_ids)
        if index is not None and messages[index].role == "assistant":
            open_answer = index
            row.answers[index] = (row.answers.get(index, (start,))[0], end)
        elif open_answer is not None:
            closing = next((n for n, i in enumerate(part.ids, 1) if i in added_ids), 0)
            row.answers[open_answer] = (row.answers[open_answer][0], start + closing)
            open_answer = None
        if part.piece.kind == "text" and index is not None:
            row.texts.append((index, start, end))
        if part.piece.clip is not None:
            row.slots.append(ClipSlot(part.piece.clip, start, part.num_samples))
    return row


def cut_row(row: Row, max_length: int) -> Row | None:
    """Drop whole turns from the end until the row fits; None if not even the first answer fits."""
    if len(row.input_ids) <= max_length:
        return row
    fitting = [end for _, end in row.answers.values() if end <= max_length]
    return _cut_at(row, max(fitting)) if fitting else None


def fit_last_exchange(
    parts: Sequence[Part], messages: Sequence[Message], max_length: int, added_ids: set[int], events: list[str]
) -> Row:
    """Make one exchange fit: shorten its prompt's text from the front; if that is not enough, drop the whole prompt; at
    worst cut the reply's tail. Raises BadClipError if audio would have to be dropped: a reply learned without the audio
    that it answers teaches the model to invent.
    """

    def is_prompt(part: Part) -> bool:
        index = part.piece.message_index
        return part.piece.kind != "scaffold" and index is not None and messages[index].role != "assistant"

    row = join_parts(parts, messages, added_ids)
    excess = row.answers[len(messages) - 1][1] - max_length
    text_tokens = sum(len(part.ids) for part in parts if is_prompt(part) and part.piece.kind == "text")
    if excess > text_tokens:
        refuse_to_drop_audio(part for part in parts if is_prompt(part))
        events.append("kept the last reply alone")
        row = join_parts([part for part in parts if not is_prompt(part)], messages, added_ids)
    elif excess > 0:
        events.append(f"kept the last exchange alone, without the first {excess} tokens of its prompt's text")
        shortened = []
        for part in parts:
            drop = min(excess, len(part.ids)) if is_prompt(part) and part.piece.kind == "text" else 0
            shortened.append(replace(part, ids=part.ids[drop:]))
            excess -= drop
        row = join_parts(shortened, messages, added_ids)
    else:
        events.append("kept the last exchange alone")
    end = row.answers[len(messages) - 1][1]
    if end > max_length:
        events.append(f"cut the tail of the reply: {end} > {max_length} tokens")
    return _cut_at(row, min(end, max_length))


def refuse_to_drop_audio(parts: Iterable[Part]) -> None:
    """Raise BadClipError if any of the parts is audio."""
    clips = {part.piece.clip.name: len(part.ids) for part in parts if part.piece.clip is not None}
    if clips:
        raise BadClipError(
            f"{', '.join(clips)}: {sum(clips.values())} tokens of audio and the reply do not fit into max_length; "
            "raise it, or choose a stretch with `start` and `end`"
        )


def _cut_at(row: Row, end: int) -> Row:
    """The first `end` tokens; an answer across the cut is shortened, answers behind it are dropped."""
    answers = {index: (start, min(stop, end)) for index, (start, stop) in row.answers.items() if start < end}
    texts = [text for text in row.texts if text[2] <= end]
    return Row(row.input_ids[:end], answers, texts, [slot for slot in row.slots if slot.start < end])
