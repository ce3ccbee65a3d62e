"""The evaluation of a model in memory: it answers every turn of dialogues, with true and with swapped audio."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qwhisper.data.dialogue import Dialogue
from qwhisper.data.encode import DialogueEncoder, NoLabelsError
from qwhisper.data.rows import IGNORE, Sample
from qwhisper.engine.executor import Executor
from qwhisper.errors import BadClipError, DataError
from qwhisper.evaluate.forgetting import NO_KIND, retention, text_answers, text_shift
from qwhisper.evaluate.listening import swap_audio
from qwhisper.evaluate.metrics import (
    character_error_rate,
    majority_share,
    majority_share_by_kind,
    same,
    share,
    whole_dialogue_share,
    word_error_rate,
)
from qwhisper.evaluate.turns import Turn, answer_row, turns_of
from qwhisper.infer.assistant import answer_prompts
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

DIALOGUES_AT_ONCE = 256  # whose audio is in memory together


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers of a model on dialogues. Shares run from 0 to 1; None: there is nothing to share or to measure.

    turns, dialogues: exactly right. turns_swapped: answers under swapped audio that still are the original's reference;
    no turn without a clip before it is among them. majority: what a guesser that knows each question's kind gets.
    text_model: what the language model without its adapter gets right of the answers after a clip, where it is asked
    the same in words; heard: the share of these that are right on speech. wer, cer: of all answers. kinds: {kind: n,
    turns, swapped, majority, text_model, heard}.
    loss: nats a supervised token, as in training; loss_swapped, loss_unswapped: of the swapped turns' reference
    answers, with swapped and with true audio; listening_gain: their difference.
    retention: of the kinds that are not among `trained_kinds`; text_shift: in nats a token, on text alone. See
    forgetting.py. notes: sentences, among them why there is no retention or no text shift, though it was asked for.
    rejected: dialogues with a bad clip (id, reason). answers: one a turn.
    """

    turns: float | None
    dialogues: float | None
    turns_swapped: float | None
    majority: float | None
    text_model: float | None
    heard: float | None
    wer: float
    cer: float
    kinds: dict[str, dict[str, Any]]
    loss: float
    loss_unswapped: float | None
    loss_swapped: float | None
    listening_gain: float | None
    retention: float | None
    text_shift: float | None
    notes: list[str]
    trained_kinds: list[str]
    counts: dict[str, int]
    seconds: float
    rejected: list[dict[str, str]]
    answers: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """By field, in their order; what `json` writes."""
        return asdict(self)


def evaluate_model(
    model: Qwen3AudioForConditionalGeneration,
    encoder: DialogueEncoder,
    dialogues: Sequence[Dialogue],
    *,
    swap: bool = True,
    text_model: bool = True,
    text: Sequence[Dialogue] | None = None,
    trained_kinds: Collection[str] = (),
    batch_size: int = 8,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model in memory, each answer asked for with the reference answers as history.

    swap: ask again with swapped audio. text_model: ask the language model without its adapter as well, and measure its
    shift on `text` (None: on what the base answers to the instructions that qwhisper ships). The model keeps its mode.
    Raises DataError if no dialogue can be used.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    executor = Executor(model, max_tokens_per_pack=None, pad_token_id=encoder.pad_token_id)
    usable, rejected, loss = _dialogue_loss(executor, encoder, dialogues)
    if not usable:
        raise DataError(
            f"no dialogue can be evaluated; the first: {rejected[0]['reason'] if rejected else 'there is none'}"
        )
    turns = turns_of(usable)
    answers = []
    for rows in _rows(encoder, turns):
        answers += answer_prompts(model, encoder, [_prompt(row) for row in rows], max_new_tokens, batch_size)
    records = [_record(turn, answer) for turn, answer in zip(turns, answers, strict=True)]
    losses: dict[str, Any] = dict.fromkeys(("loss_unswapped", "loss_swapped", "listening_gain"))
    if swap:
        losses |= _with_swapped_audio(model, encoder, executor, turns, records, batch_size, max_new_tokens, seed)
    shift, no_shift = None, None
    if text_model:
        _with_text_model(records, turns, text_answers(model, encoder, turns, max_new_tokens, batch_size))
        shift, no_shift = text_shift(executor, encoder, text)
    model.train(was_training)
    scores = _scores(records)
    return Evaluation(
        **scores,
        loss=loss,
        **losses,
        retention=retention(scores["kinds"], trained_kinds),
        text_shift=shift,
        notes=_notes(scores, trained_kinds, no_shift) + _not_asked(usable),
        trained_kinds=sorted(trained_kinds),
        counts=_counts(usable, turns, records),
        seconds=round(time.perf_counter() - started, 2),
        rejected=rejected,
        answers=records,
    )


def _dialogue_loss(
    executor: Executor, encoder: DialogueEncoder, dialogues: Sequence[Dialogue]
) -> tuple[list[Dialogue], list[dict], float]:
    """The dialogues that can be used, the others with the reason, and the loss over all supervised tokens."""
    usable, rejected, mean = [], [], _TokenMean()
    for first in range(0, len(dialogues), DIALOGUES_AT_ONCE):
        samples: list[Sample] = []
        for dialogue in dialogues[first : first + DIALOGUES_AT_ONCE]:
            try:
                samples += encoder.encode_rows(dialogue)
                usable.append(dialogue)
            except (BadClipError, NoLabelsError) as error:
                rejected.append({"id": dialogue.id, "reason": str(error)})
        mean.add(executor, samples)
    return usable, rejected, mean.value


class _TokenMean:
    """Mean loss a supervised token over lists of samples that are never in memory together."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, executor: Executor, samples: Sequence[Sample]) -> None:
        tokens = sum(sample.num_supervised for sample in samples)
        self.total += executor.evaluate(samples) * tokens
        self.tokens += tokens

    @property
    def value(self) -> float:
        return self.total / max(1, self.tokens)


def _rows(encoder: DialogueEncoder, turns: Sequence[Turn]) -> Iterator[list[Sample]]:
    """Rows of turns, many at a time, each with its answer alone supervised."""
    for first in range(0, len(turns), DIALOGUES_AT_ONCE):
        yield [answer_row(encoder, turn) for turn in turns[first : first + DIALOGUES_AT_ONCE]]


def _prompt(row: Sample) -> Sample:
    """What stands before a row's answer: the generation prompt at that turn, with all audio."""
    start = row.answer_spans[-1][0]
    return replace(
        row, input_ids=row.input_ids[:start], labels=np.full_like(row.labels[:start], IGNORE), answer_spans=[]
    )


def _record(turn: Turn, answer: str) -> dict[str, Any]:
    """One line of `answers`; turn: which answer of the dialogue it is, from 1."""
    number = sum(message.role == "assistant" for message in turn.dialogue.messages[: turn.index + 1])
    return {
        "id": turn.dialogue.id,
        "turn": number,
        "kind": turn.answer.kind or NO_KIND,
        "reference": turn.reference,
        "answer": answer,
        "right": same(turn.reference, answer),
    }


def _with_swapped_audio(model, encoder, executor, turns, records, batch_size, max_new_tokens, seed) -> dict[str, float]:
    """Adds swapped_answer, swapped_same and swapped_same_question to the records of the turns that have a partner."""
    found = [(position, swapped) for position, swapped in enumerate(swap_audio(turns, seed=seed)) if swapped]
    if not found:
        return {}
    unswapped, with_swapped, answers = _TokenMean(), _TokenMean(), []
    for rows in _rows(encoder, [turns[position] for position, _ in found]):
        unswapped.add(executor, rows)
    for rows in _rows(encoder, [swapped.turn for _, swapped in found]):
        with_swapped.add(executor, rows)
        answers += answer_prompts(model, encoder, [_prompt(row) for row in rows], max_new_tokens, batch_size)
    for (position, swapped), answer in zip(found, answers, strict=True):
        records[position]["swapped_answer"] = answer
        records[position]["swapped_same"] = same(records[position]["reference"], answer)
        records[position]["swapped_same_question"] = swapped.same_question
    return {
        "loss_unswapped": unswapped.value,
        "loss_swapped": with_swapped.value,
        "listening_gain": with_swapped.value - unswapped.value,
    }


def _with_text_model(records: list[dict], turns: Sequence[Turn], answers: Sequence[str | None]) -> None:
    """Adds text_model_answer and text_model_right to the records of the turns that it was asked."""
    for record, turn, answer in zip(records, turns, answers, strict=True):
        if answer is not None:
            record["text_model_answer"], record["text_model_right"] = answer, same(turn.reference, answer)


def _scores(records: list[dict]) -> dict[str, Any]:
    kinds = sorted({record["kind"] for record in records})
    references = [record["reference"] for record in records]
    answers = [record["answer"] for record in records]
    return {
        "turns": share(record["right"] for record in records),
        "dialogues": whole_dialogue_share(
            [record["id"] for record in records], [record["right"] for record in records]
        ),
        "turns_swapped": _swapped_share(records),
        "majority": majority_share_by_kind([record["kind"] for record in records], references),
        **_text_model_shares(records),
        "wer": word_error_rate(references, answers),
        "cer": character_error_rate(references, answers),
        "kinds": {kind: _kind_scores([record for record in records if record["kind"] == kind]) for kind in kinds},
    }


def _notes(scores: dict[str, Any], trained_kinds: Collection[str], no_shift: str | None) -> list[str]:
    notes = []
    if not trained_kinds and scores["text_model"] is not None and scores["kinds"].keys() != {NO_KIND}:
        notes.append(
            "No retention: the checkpoint's training data names no `kind`, so what was never trained on is unknown; "
            "give the answers of the training data a `kind`."
        )
    return notes + ([f"No text shift: {no_shift}."] if no_shift else [])


def _not_asked(dialogues: Sequence[Dialogue]) -> list[str]:
    answers = [message for dialogue in dialogues for message in dialogue.messages if message.is_answer]
    masked = sum(not answer.learned for answer in answers)
    calls = sum(answer.learned and bool(answer.tool_calls) for answer in answers)
    notes = [f"Masked answers (`loss` false), which are history alone: {masked}."] if masked else []
    return notes + ([f"Answers with tool calls, of which the loss alone is measured: {calls}."] if calls else [])


def _kind_scores(records: list[dict]) -> dict[str, Any]:
    return {
        "n": len(records),
        "turns": share(record["right"] for record in records),
        "swapped": _swapped_share(records),
        "majority": majority_share(record["reference"] for record in records),
        **_text_model_shares(records),
    }


def _text_model_shares(records: list[dict]) -> dict[str, float | None]:
    """Of the answers that the text model was asked for as well, what each got right."""
    both = [record for record in records if "text_model_right" in record]
    return {
        "text_model": share(record["text_model_right"] for record in both),
        "heard": share(record["right"] for record in both),
    }


def _swapped_share(records: list[dict]) -> float | None:
    return share(record["swapped_same"] for record in records if "swapped_same" in record)


def _counts(dialogues: Sequence[Dialogue], turns: Sequence[Turn], records: list[dict]) -> dict[str, int]:
    swapped = [record for record in records if "swapped_same" in record]
    without_audio = sum(not turn.clips for turn in turns)
    return {
        "dialogues": len(dialogues),
        "turns": len(turns),
        "swapped": len(swapped),
        "swapped_same_question": sum(record["swapped_same_question"] for record in swapped),
        "without_audio": without_audio,
        "not_swapped": len(turns) - without_audio - len(swapped),
    }
