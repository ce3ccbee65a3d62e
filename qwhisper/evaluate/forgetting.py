"""Measures forgetting: how well the model still answers kinds of question that it was not trained on (retention), and
how far its answers to text have moved from the base's (text shift).

A model that was trained on a few kinds of question may hear and yet have forgotten how to answer the others. Retention
compares its answers on such kinds with those of the language model to the transcripts. A question counts only if the
language model without its adapter answers it correctly from the words.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np

from qwhisper.data.dialogue import Dialogue, Message, in_words
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.instructions import instruction_pool
from qwhisper.data.processes import Poll, nothing
from qwhisper.data.rows import IGNORE, Sample
from qwhisper.engine.executor import Executor
from qwhisper.errors import DataError
from qwhisper.evaluate.turns import Decoded, Turn, first_whole, turns_of
from qwhisper.infer.assistant import answer_prompts
from qwhisper.infer.context import context_length
from qwhisper.model.lora import adapter_off
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

SOLID = 0.7  # a kind that the text model answers less well than this does not count
OWN_TOKENS = 32  # first tokens of an answer: how it begins and what it is about
NO_KIND = "(none)"  # of messages without `kind`: whether it was trained on is unknown
OWN_ANSWERS = 64  # some 1500 tokens: a language model of 1.5B takes minutes for more on a CPU
MIN_ANSWERS = 8  # different ones; a model with fewer has no answers to text whose shift could be measured


def text_answers(
    model: Qwen3AudioForConditionalGeneration,
    encoder: DialogueEncoder,
    turns: Sequence[Turn],
    max_new_tokens: int,
    batch_size: int,
) -> list[str | None]:
    """Answers of the language model without its adapter, which reads the transcripts. None for a turn without a clip
    before it, with a clip that has no transcript, or whose prompt in words fills the model's context.
    """
    prompts, context = {}, context_length(model.config)
    for position, turn in enumerate(turns):
        if turn.clips and (typed := in_words(turn.history)) is not None:
            prompt = encoder.encode_prompt(typed, tools=turn.dialogue.tools)
            if context is None or len(prompt.input_ids) < context:
                prompts[position] = prompt
    with adapter_off(model):
        answers = answer_prompts(model, encoder, list(prompts.values()), max_new_tokens, batch_size)
    found = dict(zip(prompts, answers, strict=True))
    return [found.get(position) for position in range(len(turns))]


def text_shift(
    executor: Executor, encoder: DialogueEncoder, dialogues: Sequence[Dialogue] | None
) -> tuple[float | None, str | None]:
    """Kullback-Leibler divergence of the adapted language model from its base, in nats a token of the answers. Both
    read the dialogues in words or, without dialogues, the base's answers to the instructions that qwhisper ships. The
    second value says why the first is None.
    """
    if dialogues is None:
        samples = own_answers(executor.model, encoder, OWN_ANSWERS)
        why_not = f"the base has fewer than {MIN_ANSWERS} different answers to the instructions that qwhisper ships"
    else:
        samples, faults = _typed_rows(encoder, dialogues)
        why_not = f"no dialogue of the text file can be read in words; the first: {faults[0] if faults else 'none'}"
    return (executor.shift_from_base(samples), None) if samples else (None, why_not)


def _typed_rows(encoder: DialogueEncoder, dialogues: Sequence[Dialogue]) -> tuple[list[Sample], list[str]]:
    """The dialogues as text, and the reasons why others can't be read as text."""
    samples: list[Sample] = []
    faults: list[str] = []
    for dialogue in dialogues:
        if (typed := in_words(dialogue.messages)) is None:
            faults.append(f"{dialogue.source}: a clip has no `transcript`")
            continue
        try:
            samples += encoder.encode_rows(replace(dialogue, messages=typed))
        except DataError as error:
            faults.append(str(error))
    return samples, faults


def own_answers(
    model: Qwen3AudioForConditionalGeneration,
    encoder: DialogueEncoder,
    count: int | None = None,
    *,
    seed: int = 0,
) -> list[Sample]:
    """At most `count` of the shipped instructions, drawn by `seed`, each with the first OWN_TOKENS of the answer of the
    language model without its adapter. Only the answers are supervised. Each answer appears once; the list is empty for
    fewer than MIN_ANSWERS.

    No training asks for this text, and the base finds it likely: a shift on it shows forgetting. Changes no global
    generator; the model must be in evaluation mode.
    """
    instructions = [line for line in instruction_pool("both") if line]
    chosen = [instructions[index] for index in np.random.default_rng(seed).permutation(len(instructions))[:count]]
    questions = [[Message("user", (line,))] for line in chosen]
    prompts = [encoder.encode_prompt(question) for question in questions]
    with adapter_off(model):
        answers = answer_prompts(model, encoder, prompts, OWN_TOKENS)
    asked = {answer: (question, prompt) for question, prompt, answer in zip(questions, prompts, answers, strict=True)}
    rows = []
    for answer, (question, prompt) in asked.items():
        row = encoder.encode_prompt(question, reply_with=answer)
        is_answer = np.arange(len(row.input_ids)) >= len(prompt.input_ids)
        rows.append(replace(row, labels=np.where(is_answer, row.input_ids, IGNORE)))
    rows = [row for row in rows if row.num_supervised]
    return rows if len(rows) >= MIN_ANSWERS else []


def retention(kinds: dict[str, dict[str, Any]], trained: Collection[str]) -> float | None:
    """The mean score on speech divided by the text model's on the words, over kinds that were never trained on and that
    the text model answers well (SOLID). None if there are none, or if no trained kind is known, because then any may
    have been trained on. kinds: as in `Evaluation`.
    """
    if not trained:
        return None
    judged = [
        scores
        for kind, scores in kinds.items()
        if kind not in (NO_KIND, *trained) and scores["text_model"] is not None and scores["text_model"] >= SOLID
    ]
    if not judged:
        return None
    return sum(scores["heard"] for scores in judged) / sum(scores["text_model"] for scores in judged)


MAX_QUESTIONS = 32  # in each group: the standard error of a share of one half is then 9 %
MIN_QUESTIONS = 8  # with fewer, 2 standard errors of a half are more than a third


@dataclass(frozen=True)
class Question:
    """The same answer after audio (`heard`) and after the words (`read`); only the answer is supervised."""

    heard: Sample
    read: Sample


@dataclass(frozen=True)
class Score:
    """The number of answers that are right to the last token, and of those asked for."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    def __str__(self) -> str:
        return f"{self.right} of {self.asked}"


@dataclass(frozen=True)
class Questions:
    """untrained: questions of kinds that were never trained on; trained: of kinds that were."""

    untrained: Sequence[Question] = ()
    trained: Sequence[Question] = ()

    def __len__(self) -> int:
        return len(self.untrained) + len(self.trained)


def choose_questions(
    dialogues: Sequence[Dialogue],
    encoder: DialogueEncoder,
    trained_kinds: Collection[str],
    *,
    seed: int,
    num_workers: int = 0,
    poll: Poll = nothing,
) -> Questions:
    """At most MAX_QUESTIONS in each group, evenly over its kinds; decodes their audio, in `num_workers` processes
    if there are any. poll: as in `first_whole`.

    `dialogues` must be held out. Empty if fewer than MIN_QUESTIONS are of kinds never trained on, or if no trained kind
    is known, because then any may have been trained on.
    """
    if not trained_kinds:
        return Questions()
    turns = turns_of([dialogues[index] for index in np.random.default_rng(seed).permutation(len(dialogues))])
    groups: Mapping[bool, dict[str, list[Turn]]] = {True: defaultdict(list), False: defaultdict(list)}
    for turn in turns:
        if turn.clips and turn.answer.kind is not None:
            groups[turn.answer.kind in trained_kinds][turn.answer.kind].append(turn)
    if sum(map(len, groups[False].values())) < MIN_QUESTIONS:
        return Questions()
    heard: Decoded = {}
    untrained = _questions(encoder, groups[False], heard, num_workers, poll)
    if len(untrained) < MIN_QUESTIONS:
        return Questions()
    return Questions(untrained, _questions(encoder, groups[True], heard, num_workers, poll))


def answered_by_text_model(executor: Executor, questions: Questions) -> Questions:
    """The questions that the language model without its adapter answers right from the words."""
    every = [*questions.untrained, *questions.trained]
    with adapter_off(executor.model):
        right = executor.answered_right([question.read for question in every])
    known = {id(question) for question, is_right in zip(every, right, strict=True) if is_right}
    return Questions(
        [question for question in questions.untrained if id(question) in known],
        [question for question in questions.trained if id(question) in known],
    )


def scores_by_ear(executor: Executor, questions: Questions) -> tuple[Score | None, Score | None]:
    """(retention, hearing): scores on `untrained` and on `trained`; None for fewer than MIN_QUESTIONS."""
    right = iter(executor.answered_right([q.heard for q in (*questions.untrained, *questions.trained)]))
    counts = [(sum(islice(right, len(group))), len(group)) for group in (questions.untrained, questions.trained)]
    retention, hearing = (Score(count, asked) if asked >= MIN_QUESTIONS else None for count, asked in counts)
    return retention, hearing


def _questions(
    encoder: DialogueEncoder,
    by_kind: Mapping[str, Sequence[Turn]],
    heard: Decoded,
    num_workers: int,
    poll: Poll,
) -> list[Question]:
    """One question of every kind, then a second one of each, and so on.

    Leaves out questions with a clip that is bad or has no transcript, and those that `encoder` would cut.
    """
    groups = []
    for turn in (turn for rank in zip_longest(*by_kind.values()) for turn in rank if turn is not None):
        if (typed := in_words(turn.history)) is not None:
            groups.append((turn, Turn(replace(turn.dialogue, messages=(*typed, turn.answer)), turn.index)))
    return [Question(*rows) for rows in first_whole(groups, MAX_QUESTIONS, encoder, heard, num_workers, poll)]
