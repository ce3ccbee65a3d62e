"""DialogueEncoder: dialogues to samples, and generation's prompts by the same path.

`layout` makes a row from the lengths of its clips, `add_audio` adds the audio, and `encode` does both.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from qwhisper.data.clips import AudioClip
from qwhisper.data.dialogue import Dialogue, as_messages, in_words, parse_own
from qwhisper.data.dialogue_audio import DialogueAudio, Heard
from qwhisper.data.features import FeatureReader
from qwhisper.data.messages import Message
from qwhisper.data.rows import (
    IGNORE,
    ClipSlot,
    Layout,
    Part,
    Row,
    RowSource,
    Sample,
    Uncached,
    cut_row,
    fit_last_exchange,
    join_parts,
)
from qwhisper.data.template import Piece, listening_template, render_pieces, supports_reasoning, template_fault
from qwhisper.data.text_tokens import added_token_ids, encode_text
from qwhisper.errors import BadClipError, DataError, UsageError
from qwhisper.frames import FrameArithmetic

TRAIN_ON = ("assistant", "last", "all")
# Gives the samples at 16 kHz of each clip of a row: `ClipLengths()` without decoding them, or `DialogueAudio.lengths`.
# Raises BadClipError, including TooLongError.
Lengths = Callable[[Sequence[AudioClip]], list[int]]
LAID_OUT_AGAIN = "laid out again"  # begins the event of a clip whose length was not the expected one


class NoLabelsError(DataError):
    """Nothing of a sample is left to learn from."""


class DialogueEncoder:
    """Makes training samples from dialogues (`encode`, `encode_rows`), and prompts for `generate` (`encode_prompt`).

    Encoding has two stages: `layout` and `layout_rows` need only the lengths of clips, `add_audio` the clips.

    audio_token_id: the placeholder, one per projected audio frame. train_on: "assistant" supervises every answer,
    "last" only the last one, "all" also what users typed; a message whose `learned` is False is never supervised.
    max_length: maximum number of tokens in a row. teach: samples carry the same dialogue in words, for the teacher.
    features: a cache of encoded clips, for `encode`, `encode_rows` and `add_audio`; None until `with_features`.
    """

    features: FeatureReader | None = None

    def __init__(
        self,
        tokenizer,
        frames: FrameArithmetic,
        *,
        audio_token_id: int,
        chat_template: str | None = None,
        train_on: str = "assistant",
        max_length: int | None = None,
        teach: bool = False,
    ):
        if train_on not in TRAIN_ON:
            raise UsageError(f"train_on is {train_on!r}; it can be {', '.join(TRAIN_ON)}")
        if max_length is not None and max_length < 2:
            raise UsageError(f"max_length is {max_length}; a row needs 2 tokens at least to learn one")
        if chat_template is None:
            chat_template = listening_template(tokenizer)[0]
        elif fault := template_fault(tokenizer, chat_template):
            raise UsageError(f"this chat template can't be trained with: {fault}; leave it out to have one made")
        self.tokenizer = tokenizer
        self.audio_token_id = audio_token_id
        self.frames = frames
        self.chat_template = chat_template
        self.train_on = train_on
        self.max_length = max_length
        self.teach = teach
        self.pad_token_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        self._part_encoder = PartEncoder(tokenizer, frames, audio_token_id, chat_template)
        self._keeps_reasoning = supports_reasoning(tokenizer, chat_template)

    def dialogue_audio(self) -> DialogueAudio:
        """A decoder of one dialogue's clips that decodes each once for all rows. Nothing is decoded yet."""
        return DialogueAudio(self.frames, self.max_length, features=self.features)

    def with_features(self, features: FeatureReader) -> "DialogueEncoder":
        """A copy whose samples have the cached features of their clips. The others are named in `Sample.uncached`."""
        copied = copy.copy(self)
        copied.features = features
        return copied

    def encode(self, dialogue: Dialogue | dict, audio: DialogueAudio | None = None) -> Sample:
        """`layout` with its audio. audio: the decoder of this dialogue's clips, if another row has made one."""
        audio = audio or self.dialogue_audio()
        return self.add_audio(self.layout(dialogue, audio.lengths), audio)

    def encode_rows(self, dialogue: Dialogue | dict, audio: DialogueAudio | None = None) -> list[Sample]:
        """`layout_rows` with their audio, each clip decoded once. Raises as `encode` does."""
        audio = audio or self.dialogue_audio()
        return [self.add_audio(layout, audio) for layout in self.layout_rows(dialogue, audio.lengths)]

    def add_audio(self, layout: Layout, audio: DialogueAudio | None = None) -> Sample:
        """The sample of a row. If a clip's length differs from the one it was laid out with, the row is laid out again,
        and `events` says so. Raises as `layout` does.
        """
        audio, dialogue = audio or self.dialogue_audio(), layout.made_of.dialogue
        with _naming_the_source(dialogue):
            lengths = audio.lengths([slot.clip for slot in layout.slots])
        if changed := _changed(layout.slots, lengths):
            again = replace(layout.made_of, events=(*layout.made_of.events, *changed))
            layout = self._lay_out(again, audio.lengths)
        heard, names = [audio.heard(slot.clip) for slot in layout.slots], [slot.clip.name for slot in layout.slots]
        return Sample(
            dialogue.id,
            dialogue.source,
            layout.input_ids,
            layout.labels,
            [window for clip in heard for window in clip.windows],
            layout.answer_spans,
            layout.events,
            _named_notes(names, heard),
            None if layout.teacher is None else self.add_audio(layout.teacher, audio),
            _uncached(names, heard),
        )

    def layout(self, dialogue: Dialogue | dict, lengths: Lengths) -> Layout:
        """The whole dialogue as one row. Raises BadClipError, NoLabelsError, DataError, with the dialogue's source.

        An earlier answer whose reasoning the template drops from the history is masked: `layout_rows` gives it a row.
        """
        dialogue, events = self._prepare(dialogue)
        answers = _learned(dialogue.messages)
        supervised = {k for k in answers if k == answers[-1] or not _has_thought(dialogue.messages, k)}
        if len(supervised) < len(answers):
            events.append(f"masked {len(answers) - len(supervised)} of {len(answers)} turns, which have reasoning")
        return self._lay_out(RowSource(dialogue, frozenset(supervised), 0, tuple(events)), lengths)

    def layout_rows(self, dialogue: Dialogue | dict, lengths: Lengths) -> list[Layout]:
        """One row; or one per answer if any answer has reasoning, which the history then drops, as Qwen does.

        Raises as `layout` does.
        """
        dialogue, events = self._prepare(dialogue)
        answers = _learned(dialogue.messages)
        if not any(message.reasoning for message in dialogue.messages) or len(answers) == 1:
            return [self._lay_out(RowSource(dialogue, frozenset(answers), 0, tuple(events)), lengths)]
        rows: list[Layout] = []
        for previous, answer in zip([-1, *answers], answers, strict=False):
            if self.train_on == "last" and answer != answers[-1]:
                continue
            messages = dialogue.messages[: answer + 1]
            row = replace(dialogue, id=f"{dialogue.id}#{len(rows) + 1}", messages=messages)
            rows.append(self._lay_out(RowSource(row, frozenset({answer}), previous + 1, tuple(events)), lengths))
        return rows

    def encode_prompt(
        self, messages: Sequence[Message | dict], *, tools: Sequence[str] = (), reply_with: str | None = None
    ) -> Sample:
        """The prompt that `generate` continues: dialogue, generation prompt, and `reply_with`, where the reply begins.

        messages: read already, or as `parse_own` reads them. tools: the JSON text of each, as in `Dialogue.tools`.
        Raises DataError, and BadClipError for an unusable clip.
        """
        read, audio = as_messages(messages), self.dialogue_audio()
        parts = self._part_encoder.parts(read, audio.lengths, tools, add_generation_prompt=True)
        row = join_parts(parts, read, self._part_encoder.added_ids)
        ids = row.input_ids + (encode_text(self.tokenizer, reply_with) if reply_with else [])
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        windows = [window for slot in row.slots for window in audio.heard(slot.clip).windows]
        return Sample("prompt", "prompt", np.array(ids, dtype=np.int64), labels, windows)

    def _prepare(self, dialogue: Dialogue | dict) -> tuple[Dialogue, list[str]]:
        """The dialogue without the messages and the reasoning that nothing is learned from, and an event for each."""
        if isinstance(dialogue, dict):
            dialogue = parse_own(dialogue, str(dialogue.get("id", "a dialogue given as a dict")))
        messages, events = dialogue.messages, []
        if not any(message.is_answer for message in messages):
            raise NoLabelsError(f"{dialogue.source}: no assistant message, so nothing to learn from")
        answers = _learned(messages)
        if not answers:
            raise NoLabelsError(f"{dialogue.source}: every answer is masked, so nothing to learn from")
        if self.train_on != "all" and len(messages) > answers[-1] + 1:
            events.append(f"left out {len(messages) - answers[-1] - 1} messages after the last answer")
            messages = messages[: answers[-1] + 1]
        if not self._keeps_reasoning and any(message.reasoning for message in messages):
            events.append("left out the reasoning: the chat template has no place for it")
            messages = tuple(replace(message, reasoning=None) for message in messages)
        return replace(dialogue, messages=messages), events

    def _lay_out(self, made_of: RowSource, lengths: Lengths) -> Layout:
        dialogue, supervised, events = made_of.dialogue, made_of.supervised, list(made_of.events)
        with _naming_the_source(dialogue):
            row, offset = self._fitting_row(dialogue, supervised, lengths, events)
        spans = {index + offset: span for index, span in row.answers.items() if index + offset in supervised}
        if self.train_on == "last":
            spans = dict(sorted(spans.items())[-1:])
        ids = np.array(row.input_ids, dtype=np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        learned = list(spans.values())
        if self.train_on == "all":
            learned += self._user_texts(dialogue.messages, row, offset, made_of.first_own)
        for start, end in learned:
            labels[start:end] = ids[start:end]
        labels[:1] = IGNORE
        layout = Layout(made_of, ids, labels, row.slots, sorted(spans.values()), events)
        if self.teach:
            layout.teacher = self._in_words(layout, lengths, cut=len(events) > len(made_of.events))
        require_labels(dialogue.source, layout)
        return layout

    def _in_words(self, heard: Layout, lengths: Lengths, *, cut: bool) -> Layout | None:
        """The dialogue in words; None if a clip has no transcript, or if max_length cuts either version: the two would
        answer with different histories, or at different turns with the same answer.
        """
        if not heard.slots:
            return replace(heard)
        made_of = heard.made_of
        if cut or (typed := in_words(made_of.dialogue.messages)) is None:
            return None
        read = self._lay_out(replace(made_of, dialogue=replace(made_of.dialogue, messages=typed), events=()), lengths)
        return None if read.events else read

    def _fitting_row(
        self, dialogue: Dialogue, supervised: frozenset[int], lengths: Lengths, events: list[str]
    ) -> tuple[Row, int]:
        """The row within max_length, and how many messages it lacks at the front."""
        messages, added_ids = dialogue.messages, self._part_encoder.added_ids
        row = join_parts(self._part_encoder.parts(messages, lengths, dialogue.tools), messages, added_ids)
        if self.max_length is None:
            return row, 0
        cut = cut_row(row, self.max_length)
        if cut is not None and supervised & cut.answers.keys():
            if len(cut.answers) < len(row.answers):
                turns = f"{len(cut.answers)} of {len(row.answers)} turns"
                events.append(f"cut to {turns}: {len(row.input_ids)} > {self.max_length} tokens")
            return cut, 0
        if dialogue.has_tools:
            raise NoLabelsError(
                "a dialogue with tools is cut only after an answer, and no learned answer of its "
                f"{len(row.input_ids)} tokens ends within max_length {self.max_length}; raise it"
            )
        last = max(supervised)
        first = max((answer + 1 for answer in _answers(messages) if answer < last), default=0)
        while first < last and messages[first].role == "system":
            first += 1
        exchange = messages[first : last + 1]
        parts = self._part_encoder.parts(exchange, lengths)
        return fit_last_exchange(parts, exchange, self.max_length, added_ids, events), first

    @staticmethod
    def _user_texts(messages: Sequence[Message], row: Row, offset: int, first_own: int) -> list[tuple[int, int]]:
        return [
            (start, end)
            for index, start, end in row.texts
            if index + offset >= first_own
            and messages[index + offset].role == "user"
            and messages[index + offset].learned
        ]


def require_labels(source: str, row: Layout | Sample) -> None:
    """Raise NoLabelsError if no token of a row is supervised. source: its dialogue's."""
    if row.num_supervised == 0:
        reasons = f" ({'; '.join(row.events)})" if row.events else ""
        raise NoLabelsError(f"{source}: no supervised token is left{reasons}; raise max_length or drop it")


@contextmanager
def _naming_the_source(dialogue: Dialogue) -> Iterator[None]:
    try:
        yield
    except (BadClipError, NoLabelsError) as error:
        raise type(error)(f"{dialogue.source}: {error}") from error
    except DataError as error:
        raise DataError(f"{dialogue.source}: {error}") from error
    except MemoryError as error:
        raise BadClipError(
            f"{dialogue.source}: out of memory while it was read, with {len(dialogue.clips)} clips; divide "
            "it, or choose stretches with `start` and `end`"
        ) from error


def _changed(slots: Sequence[ClipSlot], lengths: Sequence[int]) -> list[str]:
    """A sentence for each clip whose length differs from the one it was laid out with."""
    sentences = [
        f"{LAID_OUT_AGAIN}: {slot.clip.name} has {length} samples at 16 kHz, and was laid out with {slot.num_samples}"
        for slot, length in zip(slots, lengths, strict=True)
        if length != slot.num_samples
    ]
    return list(dict.fromkeys(sentences))


def _named_notes(names: Sequence[str], heard: Sequence[Heard]) -> list[str]:
    """Each note once, with the name of its clip. names: of the clips, in the order of `heard`."""
    notes = [f"{name}: {note}" for name, clip in zip(names, heard, strict=True) for note in clip.notes]
    return list(dict.fromkeys(notes))


def _uncached(names: Sequence[str], heard: Sequence[Heard]) -> list[Uncached]:
    """names: of the clips, in the order of `heard`."""
    found, first = [], 0
    for name, clip in zip(names, heard, strict=True):
        if clip.missing is not None:
            found.append(Uncached(clip.missing, name, first, len(clip.windows), clip.num_samples, clip.notes))
        first += len(clip.windows)
    return found


def _answers(messages: Sequence[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.is_answer]


def _has_thought(messages: Sequence[Message], answer: int) -> bool:
    """Whether there is reasoning since the question of this answer, with tool calls between them."""
    asked = max((index for index in range(answer) if messages[index].role == "user"), default=0)
    return any(message.reasoning for message in messages[asked : answer + 1])


def _learned(messages: Sequence[Message]) -> list[int]:
    return [index for index in _answers(messages) if messages[index].learned]


class PartEncoder:
    """Tokenises pieces; remembers the few texts of the scaffold."""

    def __init__(
        self,
        tokenizer,
        frames: FrameArithmetic,
        audio_token_id: int,
        chat_template: str,
    ):
        self.tokenizer = tokenizer
        self.frames = frames
        self.audio_token_id = audio_token_id
        self.chat_template = chat_template
        self.added_ids = added_token_ids(tokenizer)
        self._scaffold_ids: dict[str, list[int]] = {}

    def parts(
        self,
        messages: Sequence[Message],
        lengths: Lengths,
        tools: Sequence[str] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> list[Part]:
        """All parts of a dialogue. Raises DataError if the template refuses it, and what `lengths` raises."""
        pieces = render_pieces(messages, self.tokenizer, self.chat_template, add_generation_prompt, tools)
        num_samples = iter(lengths([piece.clip for piece in pieces if piece.clip is not None]))
        return [self._audio_part(piece, next(num_samples)) if piece.clip else self._part(piece) for piece in pieces]

    def _part(self, piece: Piece) -> Part:
        if piece.kind == "text":
            return Part(piece, encode_text(self.tokenizer, piece.text))
        if piece.text not in self._scaffold_ids:
            self._scaffold_ids[piece.text] = self.tokenizer(piece.text, add_special_tokens=False)["input_ids"]
        return Part(piece, self._scaffold_ids[piece.text])

    def _audio_part(self, piece: Piece, num_samples: int) -> Part:
        return Part(piece, [self.audio_token_id] * self.frames.num_tokens(num_samples), num_samples)
