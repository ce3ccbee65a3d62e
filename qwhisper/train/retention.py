"""Held-out questions that show in a run whether the model still thinks about what it hears.

Of kinds that it was never trained on and, to compare with, of those that it is: only such questions count as the
language model itself, without its adapter, answers right where it reads the words.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

import numpy as np

from qwhisper.data.collator import ConversationCollator, Sample
from qwhisper.data.dialogue import Conversation, in_words
from qwhisper.engine.executor import Executor
from qwhisper.errors import DataError
from qwhisper.evaluate.listening import Turn, answer_row, turns_of
from qwhisper.model.lora import adapter_off

MAX_QUESTIONS = 32  # of either group: a share of one half is then known to 9 %
MIN_QUESTIONS = 8  # with fewer, 2 standard errors of a half are more than a third


@dataclass(frozen=True)
class Question:
    """One answer after audio, which alone is supervised, and the same one after the words."""

    heard: Sample
    read: Sample


@dataclass(frozen=True)
class Score:
    """Answers that are right to the last token, of how many."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    def __str__(self) -> str:
        return f"{self.right} of {self.asked}"


@dataclass(frozen=True)
class Questions:
    """untrained: of kinds that were never trained on; trained: of kinds that were."""

    untrained: Sequence[Question] = ()
    trained: Sequence[Question] = ()

    def __len__(self) -> int:
        return len(self.untrained) + len(self.trained)


def choose_questions(
    conversations: Sequence[Conversation], collator: ConversationCollator, trained_kinds: Collection[str], *, seed: int
) -> Questions:
    """At most MAX_QUESTIONS of either group, from all of its kinds alike; decodes their audio.

    `conversations` must be held out. None at all where fewer than MIN_QUESTIONS are of kinds never trained on, and
    where no trained kind is known: any may have been trained on then.
    """
    if not trained_kinds:
        return Questions()
    turns = turns_of([conversations[index] for index in np.random.default_rng(seed).permutation(len(conversations))])
    groups: Mapping[bool, dict[str, list[Turn]]] = {True: defaultdict(list), False: defaultdict(list)}
    for turn in turns:
        if turn.clips and turn.answer.kind is not None:
            groups[turn.answer.kind in trained_kinds][turn.answer.kind].append(turn)
    if sum(map(len, groups[False].values())) < MIN_QUESTIONS:
        return Questions()
    untrained = list(islice(_questions(collator, groups[False]), MAX_QUESTIONS))
    if len(untrained) < MIN_QUESTIONS:
        return Questions()
    return Questions(untrained, list(islice(_questions(collator, groups[True]), MAX_QUESTIONS)))


def answered_by_text_model(executor: Executor, questions: Questions) -> Questions:
    """Those that the language model without its adapter answers right where it reads the words."""
    every = [*questions.untrained, *questions.trained]
    with adapter_off(executor.model):
        right = executor.answered_right([question.read for question in every])
    known = {id(question) for question, is_right in zip(every, right, strict=True) if is_right}
    return Questions(
        [question for question in questions.untrained if id(question) in known],
        [question for question in questions.trained if id(question) in known],
    )


def scores_by_ear(executor: Executor, questions: Questions) -> tuple[Score | None, Score | None]:
    """(retention, hearing): of `untrained` and of `trained`; None for fewer than MIN_QUESTIONS."""
    right = iter(executor.answered_right([q.heard for q in (*questions.untrained, *questions.trained)]))
    counts = [(sum(islice(right, len(group))), len(group)) for group in (questions.untrained, questions.trained)]
    retention, hearing = (Score(count, asked) if asked >= MIN_QUESTIONS else None for count, asked in counts)
    return retention, hearing


def _questions(collator: ConversationCollator, by_kind: Mapping[str, Sequence[Turn]]) -> Iterator[Question]:
    """One of every kind, then a second one of each, and so on.

    Left out: those with a clip that is bad or has no transcript, and those that `collator` would cut.
    """
    for turn in (turn for rank in zip_longest(*by_kind.values()) for turn in rank if turn is not None):
        if (typed := in_words(turn.history)) is None:
            continue
        in_text = Turn(replace(turn.conversation, messages=(*typed, turn.answer)), turn.index)
        try:
            heard, read = answer_row(collator, turn), answer_row(collator, in_text)
        except DataError:
            continue
        if not heard.events and not read.events:
            yield Question(heard, read)
