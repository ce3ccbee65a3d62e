"""Evaluates a model in memory: asks for the answer of every turn, with true and with swapped audio."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from qwhisper.infer.context import TooLongPromptError, context_length
from qwhisper.model.qwen3_audio import Qwen3AudioForConditionalGeneration

DIALOGUES_AT_ONCE = 256  # their audio is in memory together


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers of a model on dialogues. Shares are from 0 to 1. None: nothing to measure.

    turns, dialogues: share that is exactly right. turns_swapped: share of answers under swapped audio that still equal
    the original reference, among turns after a clip. majority: score of a guesser that knows each question's kind.
    text_model: share of answers after a clip that the language model without its adapter gets right from the
    transcripts; heard: share of the same answers that are right on speech. wer, cer: error rates of all answers. kinds:
    {kind: n, turns, swapped, majority, text_model, heard}.
    loss: nats a supervised token, as in training; loss_swapped, loss_unswapped: the same for the reference answers of
    swapped turns, with swapped and with true audio; listening_gain: their difference.
    retention: on kinds that are not in `trained_kinds`; text_shift: nats a token, on text alone; see forgetting.py.
    notes: sentences, such as why retention or text shift is missing. rejected: dialogues with a bad clip, or longer
    than the model's context (id, reason). answers: one record for each turn.
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
        """The fields as a dictionary of JSON's types, in their order."""
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
    """Evaluate a model in memory. Each answer is asked for with the reference answers as history.

    swap: ask again with swapped audio. text_model: ask the language model without its adapter as well, and measure its
    shift on `text` (None: on what the base answers to the instructions that qwhisper ships). The model keeps its mode.
    Raises DataError if no dialogue can be used.
    """
    started = time.perf_counter()
    executor = Executor(model, max_tokens_per_pack=None, pad_token_id=encoder.pad_token_id)

    def answer(rows: Sequence[Sample]) -> list[str]:
        return answer_prompts(model, encoder, [_prompt(row) for row in rows], max_new_tokens, batch_size)

    with executor.evaluation_mode():
        heard = _with_true_audio(executor, encoder, dialogues, answer, measure_turns=swap)
        usable, turns, rejected = heard.usable, heard.turns, heard.rejected
        if not usable:
            raise DataError(
                f"no dialogue can be evaluated; the first: {rejected[0]['reason'] if rejected else 'there is none'}"
            )
        records = [_record(turn, text) for turn, text in zip(turns, heard.answers, strict=True)]
        losses: dict[str, Any] = dict.fromkeys(("loss_unswapped", "loss_swapped", "listening_gain"))
        if swap:
            losses |= _with_swapped_audio(executor, encoder, heard, records, answer, seed)
        shift, no_shift = None, None
        if text_model:
            _with_text_model(records, turns, text_answers(model, encoder, turns, max_new_tokens, batch_size))
            shift, no_shift = text_shift(executor, encoder, text)
    scores = _scores(records)
    return Evaluation(
        **scores,
        loss=heard.loss.value,
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


class _TokenMean:
    """Mean loss a supervised token, in nats, over lists of samples that are not in memory together."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, executor: Executor, samples: Sequence[Sample]) -> None:
        tokens = sum(sample.num_supervised for sample in samples)
        self.total += executor.evaluate(samples) * tokens
        self.tokens += tokens

    @property
    def value(self) -> float:
        return self.total / max(1, self.tokens)


@dataclass(eq=False)
class _Heard:
    """The results of the pass with true audio.

    usable: dialogues; rejected: the others (id, reason). loss: over all supervised tokens of `usable`. turns, answers:
    one for each answer to ask for. turn_losses: (nats, supervised tokens) of each turn after a clip, by position.
    """

    usable: list[Dialogue] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    loss: _TokenMean = field(default_factory=_TokenMean)
    turns: list[Turn] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    turn_losses: dict[int, tuple[float, int]] = field(default_factory=dict)


def _with_true_audio(
    executor: Executor,
    encoder: DialogueEncoder,
    dialogues: Sequence[Dialogue],
    answer: Callable[[Sequence[Sample]], list[str]],
    *,
    measure_turns: bool,
) -> _Heard:
    """Loss and answers; decodes each dialogue's clips once. answer: gives the model's answers to rows of turns."""
    heard, context = _Heard(), context_length(executor.model.config)
    for first in range(0, len(dialogues), DIALOGUES_AT_ONCE):
        samples: list[Sample] = []
        rows: list[Sample] = []
        for dialogue in dialogues[first : first + DIALOGUES_AT_ONCE]:
            audio = encoder.dialogue_audio()
            turns = turns_of([dialogue])
            try:
                whole = encoder.encode_rows(dialogue, audio)
                asked = [answer_row(encoder, turn, audio) for turn in turns]
                _refuse_beyond(context, dialogue, [*whole, *asked])
            except (BadClipError, NoLabelsError, TooLongPromptError) as error:
                heard.rejected.append({"id": dialogue.id, "reason": str(error)})
                continue
            samples += whole
            rows += asked
            heard.usable.append(dialogue)
            heard.turns += turns
        heard.loss.add(executor, samples)
        if measure_turns:
            after_clips = {len(heard.answers) + n: row for n, row in enumerate(rows) if row.windows}
            heard.turn_losses |= zip(after_clips, _row_losses(executor, list(after_clips.values())), strict=True)
        heard.answers += answer(rows)
    return heard


def _refuse_beyond(context: int | None, dialogue: Dialogue, rows: Sequence[Sample]) -> None:
    longest = max(len(row.input_ids) for row in rows)
    if context is not None and longest > context:
        raise TooLongPromptError(
            f"{dialogue.source}: the dialogue takes {longest} tokens and the model's context has {context}: divide it, "
            "or use shorter clips"
        )


def _row_losses(executor: Executor, rows: Sequence[Sample]) -> list[tuple[float, int]]:
    """(nats, supervised tokens) of each row; nats are summed over its supervised tokens."""

    def attempt() -> Tensor:
        return torch.tensor(executor.sample_losses(rows), dtype=torch.float64)

    losses, _ = executor.within_memory(attempt, rows, lambda: None)
    return [(nats, row.num_supervised) for nats, row in zip(losses.tolist(), rows, strict=True)]


def _mean(losses: Iterable[tuple[float, int]]) -> float:
    """Nats a supervised token."""
    nats, tokens = zip(*losses, strict=True)
    return sum(nats) / max(1, sum(tokens))


def _prompt(row: Sample) -> Sample:
    """The part of a row before its answer: the generation prompt of that turn, with all audio."""
    start = row.answer_spans[-1][0]
    return replace(
        row, input_ids=row.input_ids[:start], labels=np.full_like(row.labels[:start], IGNORE), answer_spans=[]
    )


def _record(turn: Turn, answer: str) -> dict[str, Any]:
    """One record of `answers`; its "turn" counts the answers of the dialogue from 1."""
    number = sum(message.role == "assistant" for message in turn.dialogue.messages[: turn.index + 1])
    return {
        "id": turn.dialogue.id,
        "turn": number,
        "kind": turn.answer.kind or NO_KIND,
        "reference": turn.reference,
        "answer": answer,
        "right": same(turn.reference, answer),
    }


def _with_swapped_audio(
    executor: Executor,
    encoder: DialogueEncoder,
    heard: _Heard,
    records: list[dict],
    answer: Callable[[Sequence[Sample]], list[str]],
    seed: int,
) -> dict[str, float]:
    """Add swapped_answer, swapped_same and swapped_same_question to the records of turns that have a partner.

    Returns the losses. Leaves out a swap that is longer than the model's context. Decodes the clips of a partner's
    dialogue once, for all turns that hear them.
    """
    swaps = {position: swapped for position, swapped in enumerate(swap_audio(heard.turns, seed=seed)) if swapped}
    by_dialogue: dict[int, list[int]] = {}
    for position, swapped in swaps.items():
        by_dialogue.setdefault(id(swapped.partner.dialogue), []).append(position)
    swapped_losses: dict[int, tuple[float, int]] = {}
    context = context_length(executor.model.config)
    groups = list(by_dialogue.values())
    for first in range(0, len(groups), DIALOGUES_AT_ONCE):
        rows: dict[int, Sample] = {}
        for positions in groups[first : first + DIALOGUES_AT_ONCE]:
            audio = encoder.dialogue_audio()
            rows |= {position: answer_row(encoder, swaps[position].turn, audio) for position in positions}
        rows = {n: row for n, row in sorted(rows.items()) if context is None or len(row.input_ids) <= context}
        swapped_losses |= zip(rows, _row_losses(executor, list(rows.values())), strict=True)
        for position, text in zip(rows, answer(list(rows.values())), strict=True):
            records[position]["swapped_answer"] = text
            records[position]["swapped_same"] = same(records[position]["reference"], text)
            records[position]["swapped_same_question"] = swaps[position].same_question
    if not swapped_losses:
        return {}
    unswapped = _mean(heard.turn_losses[position] for position in swapped_losses)
    with_swapped = _mean(swapped_losses.values())
    return {
        "loss_unswapped": unswapped,
        "loss_swapped": with_swapped,
        "listening_gain": with_swapped - unswapped,
    }


def _with_text_model(records: list[dict], turns: Sequence[Turn], answers: Sequence[str | None]) -> None:
    """Add text_model_answer and text_model_right to the records of the turns that the text model was asked."""
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
            "No retention: the checkpoint's training data names no `kind`, so the kinds that were never trained on are "
            "unknown; give the answers of the training data a `kind`."
        )
    return notes + ([f"No text shift: {no_shift}."] if no_shift else [])


def _not_asked(dialogues: Sequence[Dialogue]) -> list[str]:
    answers = [message for dialogue in dialogues for message in dialogue.messages if message.is_answer]
    masked = sum(not answer.learned for answer in answers)
    calls = sum(answer.learned and bool(answer.tool_calls) for answer in answers)
    notes = [f"Masked answers (`loss` false), used only as history: {masked}."] if masked else []
    return notes + ([f"Answers with tool calls, measured by their loss alone: {calls}."] if calls else [])


def _kind_scores(records: list[dict]) -> dict[str, Any]:
    return {
        "n": len(records),
        "turns": share(record["right"] for record in records),
        "swapped": _swapped_share(records),
        "majority": majority_share(record["reference"] for record in records),
        **_text_model_shares(records),
    }


def _text_model_shares(records: list[dict]) -> dict[str, float | None]:
    """Shares that the text model and the model on speech got right, of the answers that both were asked for."""
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
