"""What is left of the text model: its own score where it reads the words, and how far its answers to text have moved.

A model that was taught to hear on a few kinds of question may have forgotten how to think about what it hears: that
shows in kinds that it was never trained on, held against what the language model makes of the transcripts.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qwhisper.data.collator import ConversationCollator, Sample
from qwhisper.data.dialogue import Conversation, Message, in_words
from qwhisper.data.encode import IGNORE
from qwhisper.data.instructions import instruction_pool
from qwhisper.engine.executor import Executor
from qwhisper.errors import DataError
from qwhisper.evaluate.listening import Turn
from qwhisper.infer.generate import answer_prompts
from qwhisper.model.lora import adapter_off
from qwhisper.model.modeling_qwen3_audio import Qwen3AudioForConditionalGeneration

SOLID = 0.7  # what the text model itself answers less well than this says nothing about what was kept
OWN_TOKENS = 32  # of an answer to an instruction: where it begins and what it is about
NO_KIND = "(none)"  # of answers whose message has no `kind`: nobody knows whether it was trained on
OWN_ANSWERS = 64  # are asked for, some 1500 tokens: on a CPU a language model of 1.5B takes minutes for more
MIN_ANSWERS = 8  # different ones; a model that has no more for all instructions has nothing in text to be moved from


def text_answers(
    model: Qwen3AudioForConditionalGeneration,
    collator: ConversationCollator,
    turns: Sequence[Turn],
    max_new_tokens: int,
    batch_size: int,
) -> list[str | None]:
    """What the language model without its adapter answers where it reads what was said; None for a turn without a clip
    before it, or with one that has no transcript.
    """
    prompts = {}
    for position, turn in enumerate(turns):
        if turn.clips and (typed := in_words(turn.history)) is not None:
            prompts[position] = collator.encode_prompt(typed, tools=turn.conversation.tools)
    with adapter_off(model):
        answers = answer_prompts(model, collator, list(prompts.values()), max_new_tokens, batch_size)
    found = dict(zip(prompts, answers, strict=True))
    return [found.get(position) for position in range(len(turns))]


def text_shift(
    executor: Executor, collator: ConversationCollator, conversations: Sequence[Conversation] | None
) -> tuple[float | None, str | None]:
    """Kullback-Leibler divergence of the adapted language model from its base, in nats a token of the answers, where
    both read the dialogues in words, or, without dialogues, of what the base answers to the instructions that qwhisper
    ships. Where nothing can be read, None, and why.
    """
    if conversations is None:
        samples = own_answers(executor.model, collator, OWN_ANSWERS)
        why_not = f"the base has fewer than {MIN_ANSWERS} different answers to the instructions that qwhisper ships"
    else:
        samples, faults = _typed_rows(collator, conversations)
        why_not = f"no dialogue of the text file can be read in words; the first: {faults[0] if faults else 'none'}"
    return (executor.shift_from_base(samples), None) if samples else (None, why_not)


def _typed_rows(
    collator: ConversationCollator, conversations: Sequence[Conversation]
) -> tuple[list[Sample], list[str]]:
    """The dialogues as text, and of those that can't be the reason."""
    samples: list[Sample] = []
    faults: list[str] = []
    for conversation in conversations:
        if (typed := in_words(conversation.messages)) is None:
            faults.append(f"{conversation.source}: a clip has no `transcript`")
            continue
        try:
            samples += collator.encode_rows(replace(conversation, messages=typed))
        except DataError as error:
            faults.append(str(error))
    return samples, faults


def own_answers(
    model: Qwen3AudioForConditionalGeneration,
    collator: ConversationCollator,
    count: int | None = None,
    *,
    seed: int = 0,
) -> list[Sample]:
    """At most `count` of the shipped instructions, drawn by `seed`, each with the first OWN_TOKENS of what the language
    model without its adapter answers; these alone are supervised. Every answer once; none at all for fewer than
    MIN_ANSWERS.

    Text that no training asked for, and that the base finds likely: where it is moved, something was forgotten. Draws
    no random number; the model must be in evaluation mode.
    """
    instructions = [line for line in instruction_pool("both") if line]
    chosen = [instructions[index] for index in np.random.default_rng(seed).permutation(len(instructions))[:count]]
    questions = [[Message("user", (line,))] for line in chosen]
    prompts = [collator.encode_prompt(question) for question in questions]
    with adapter_off(model):
        answers = answer_prompts(model, collator, prompts, OWN_TOKENS)
    asked = {answer: (question, prompt) for question, prompt, answer in zip(questions, prompts, answers, strict=True)}
    rows = []
    for answer, (question, prompt) in asked.items():
        row = collator.encode_prompt(question, reply_with=answer)
        is_answer = np.arange(len(row.input_ids)) >= len(prompt.input_ids)
        rows.append(replace(row, labels=np.where(is_answer, row.input_ids, IGNORE)))
    rows = [row for row in rows if row.num_supervised]
    return rows if len(rows) >= MIN_ANSWERS else []


def retention(kinds: dict[str, dict[str, Any]], trained: Collection[str]) -> float | None:
    """The mean score on speech over the text model's on the words, of the kinds that were never trained on and that the
    text model answers well (SOLID); None where there are none, and where no trained kind is known, since any may have
    been trained on then. kinds: as `evaluate_model` returns them.
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
