"""Writes training answers: the text model reads the transcripts and answers them.

Its prompts are those of training, with each clip's transcript instead of the audio. Each batch of answers is written to
the disk, in OUT.cache.jsonl, before the next is computed; OUT itself is written at the end. The cache's key is the
prompt, the model and the largest number of tokens: another model finds none of these answers, and for a longer input
only the new ones are computed.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel

from qwhisper.data.dialogue import Dialogue, in_words, scan_dialogues, to_record
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.instructions import as_question, instruction_pool, read_instructions
from qwhisper.data.messages import THINK_MARKS, Message
from qwhisper.data.records import MAX_LINE_BYTES
from qwhisper.data.rows import Sample
from qwhisper.data.tools import CALL_MARKS
from qwhisper.disk import write_whole
from qwhisper.errors import DataError, UsageError
from qwhisper.frames import FrameArithmetic
from qwhisper.infer.batches import answer_batches
from qwhisper.infer.context import context_length, within_context
from qwhisper.infer.decoding import Request
from qwhisper.locks import hold
from qwhisper.memory import naming_memory_limit
from qwhisper.model.base_kinds import refuse_empty_tokenizer
from qwhisper.model.bases import LoadOptions, fingerprint, load_language_model
from qwhisper.model.pretrained import load_config, load_tokenizer
from qwhisper.report.events import ends_in_half_a_line, read_jsonl

# Prompts in memory together, the longest first. Windows are cut from all questions, including those answered before a
# kill, so that the same ones share a batch afterwards: in bf16 the rounding depends on the batch.
WINDOW = 4096


@dataclass(frozen=True)
class Question:
    """A prompt of the text model, and the cache's key of its answer."""

    key: str
    prompt: Sample


@dataclass(frozen=True)
class Written:
    """An answer in the cache. ended: whether the model ended its turn; else the answer was cut at `max_new_tokens`."""

    text: str
    ended: bool


@dataclass(frozen=True)
class Answered:
    """The result for a file of dialogues.

    dialogues: those with their answers, in order. given: how many of them the text model answered. asked: how many
    prompts it read now; the rest was in the cache. cut: how many answers were left out because they had too many
    tokens. faults: why dialogues were not answered.
    """

    dialogues: list[Dialogue]
    given: int
    asked: int
    cut: int
    faults: list[str]


def read_unanswered(
    in_file: str | Path, *, data_root: str | Path | None, instructions: str | None, language: str, seed: int
) -> tuple[list[Dialogue], list[str]]:
    """Dialogues and faults of a file. A dialogue may end with a question. A line may be a clip alone; it gets an
    instruction from the file `instructions`, or else one that qwhisper ships in `language`.
    """
    pool = instruction_pool(language) if instructions is None else read_instructions(instructions)
    convert = partial(as_question, instructions=pool, seed=seed)
    return scan_dialogues(in_file, data_root=data_root, answered=False, convert=convert)


def answer_dialogues(
    dialogues: Sequence[Dialogue],
    text_model: str,
    options: LoadOptions,
    out_file: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> Answered:
    """Answer the dialogues with a text model, and write those with answers to `out_file`, if there are any.

    text_model: its folder. The cache is beside `out_file`; this process locks it.
    """
    encoder = encoder_for_text(text_model)
    settings = [fingerprint(text_model), str(options.compute_dtype), options.load_in_4bit, max_new_tokens]
    context = context_length(load_config(text_model))
    questions, unread = find_questions(dialogues, encoder, settings, context)
    cache = _cache_beside(out_file)
    with _held(cache):
        answers, asked = answer_all(
            list(questions.values()),
            encoder,
            partial(_load, text_model, options),
            cache,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        answered, silent, cut = with_answers(dialogues, questions, answers)
        if answered:
            _write(out_file, answered)
    return Answered(answered, len(questions) - len(silent) - cut, asked, cut, [*unread, *silent])


def encoder_for_text(path: str) -> DialogueEncoder:
    """The encoder that makes a text model's prompts as in training."""
    tokenizer = load_tokenizer(path)
    refuse_empty_tokenizer(tokenizer, path)
    return DialogueEncoder(tokenizer, FrameArithmetic(), audio_token_id=len(tokenizer))


def find_questions(
    dialogues: Sequence[Dialogue], encoder: DialogueEncoder, settings: Sequence, context: int | None
) -> tuple[dict[int, Question], list[str]]:
    """The questions of dialogues that need an answer, by position, and the reasons why others can't be asked.

    settings: everything except the prompt that an answer depends on. context: the model's, see `context_length`.
    """
    questions, faults = {}, []
    for position, dialogue in enumerate(dialogues):
        if not _is_open(dialogue):
            continue
        messages = in_words(dialogue.messages)
        if messages is None:
            faults.append(f"{dialogue.source}: a clip has no `transcript`, and the text model can't hear it")
            continue
        try:
            prompt = encoder.encode_prompt(messages, tools=dialogue.tools)
            within_context(prompt, Request(), context)
        except DataError as error:  # the chat template refuses these roles, or the dialogue is too long
            faults.append(f"{dialogue.source}: {error}")
            continue
        key = hashlib.sha256(json.dumps(settings).encode() + prompt.input_ids.tobytes()).hexdigest()
        questions[position] = Question(key, prompt)
    return questions, faults


def answer_all(
    questions: Sequence[Question],
    encoder: DialogueEncoder,
    load: Callable[[], PreTrainedModel],
    cache: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[dict[str, Written], int]:
    """All known answers by key, those of the questions included, and how many were not in the cache. load: loads the
    model; called only if an answer is missing.
    """
    answers = read_answers(cache)
    unique = list({question.key: question for question in questions}.values())
    missing = sum(question.key not in answers for question in unique)
    if not missing:
        return answers, 0
    model, request = load(), Request(max_new_tokens=max_new_tokens)
    with tqdm(total=missing, unit="answer", disable=None, leave=False) as bar:
        for first in range(0, len(unique), WINDOW):
            asked = [question for question in unique[first : first + WINDOW] if question.key not in answers]
            prompts = [question.prompt for question in asked]
            for batch in answer_batches(model, encoder, prompts, request, batch_size):
                found = {
                    asked[index].key: Written(answer.text, answer.finish_reason == "stop")
                    for index, answer in batch.items()
                }
                keep_answers(cache, found)
                answers |= found
                bar.update(len(found))
    return answers, missing


def with_answers(
    dialogues: Sequence[Dialogue], questions: dict[int, Question], answers: dict[str, Written]
) -> tuple[list[Dialogue], list[str], int]:
    """The dialogues with an answer, new or old, in order; the faults of unusable answers; the number of answers that
    were left out because they reached the limit of tokens.
    """
    answered, faults, cut = [], [], 0
    for position, dialogue in enumerate(dialogues):
        if not _is_open(dialogue):
            answered.append(dialogue)
        elif position in questions:
            found = answers[questions[position].key]
            if fault := _unusable(found.text):
                faults.append(f"{dialogue.source}: {fault}")
                continue
            if not found.ended:  # it would train the model to stop in mid-sentence
                cut += 1
                continue
            answer = Message("assistant", (found.text,), kind=dialogue.messages[-1].kind)
            answered.append(replace(dialogue, messages=(*dialogue.messages, answer)))
    return answered, faults, cut


def read_answers(cache: Path) -> dict[str, Written]:
    """The answers so far, by key. Skips lines that this command did not write."""
    answers = {}
    for record in read_jsonl(cache):
        match record:
            case {"key": str(key), "text": str(text), "ended": bool(ended)}:
                answers[key] = Written(text, ended)
    return answers


def _unusable(text: str) -> str | None:
    """Why an answer of the text model can't be trained on, or None."""
    if not text or any(mark in text for mark in THINK_MARKS):
        return f"the text model answered {'reasoning' if text else 'nothing'}; word the question differently"
    if any(mark in text for mark in CALL_MARKS):
        return "the text model called a tool; write the call as `tool_calls`, and the tool's response behind it"
    return None


def _is_open(dialogue: Dialogue) -> bool:
    return dialogue.messages[-1].role in ("user", "tool")


def refuse_foreign_output(in_file: Path, out_file: Path) -> None:
    """Raises UsageError if the output is the input, or exists and was not written by this module."""
    if out_file.is_dir():
        raise UsageError(f"{out_file} is a folder: give a file for the output")
    cache = _cache_beside(out_file)
    for taken in (out_file, cache):
        if taken.resolve() == in_file.resolve():
            raise UsageError(f"{taken} is the input as well: give another file for the output")
    if out_file.exists() and not (cache.exists() and cache.stat().st_size):
        raise UsageError(
            f"{out_file} exists without {cache.name} and answers in it, so `data answer` may not have written it: give "
            "another file, or move it away"
        )


def _cache_beside(out_file: Path) -> Path:
    """The file of the answers so far."""
    return out_file.with_name(f"{out_file.name}.cache.jsonl")


@contextmanager
def _held(cache: Path) -> Iterator[None]:
    """Create the cache if it is missing, and lock it: two processes would compute the same answers and overwrite each
    other's output. At the end delete an empty cache, and the folders that were created for it.
    """
    try:
        made = [folder for folder in cache.parents if not folder.exists()]
        cache.parent.mkdir(parents=True, exist_ok=True)
        file = cache.open("a")
    except OSError as error:
        raise UsageError(f"{cache} can't be written ({error}): give another file for the output") from None
    with file:
        # Not `lockf`: closing the file after each batch would release that lock.
        hold(
            file.fileno(),
            fcntl.flock,
            cache,
            name=str(cache),
            place=str(cache),
            writer="`data answer`",
            another="file for the output",
        )
        try:
            yield
        finally:
            if cache.exists() and not cache.stat().st_size:
                cache.unlink()
                with suppress(OSError):  # the folder has OUT in it
                    for folder in made:
                        folder.rmdir()


def _load(path: str, options: LoadOptions) -> PreTrainedModel:
    with naming_memory_limit(f"while {path} was loaded", "--load_in_4bit"):
        return load_language_model(path, options)


def folder_of_far_audio(dialogues: Sequence[Dialogue], folder: Path) -> str | None:
    """The common folder of all audio files that are not below `folder`; None if there are none."""
    clips = {clip.path for dialogue in dialogues for clip in dialogue.clips if clip.sound is None}
    root = os.path.realpath(folder)
    far = [os.path.dirname(path) for path in clips if not Path(path).is_relative_to(root)]
    return os.path.commonpath(far) if far else None


def keep_answers(cache: Path, answers: dict[str, Written]) -> None:
    lines = [json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) for key, answer in answers.items()]
    torn = ends_in_half_a_line(cache)
    with cache.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + "\n".join(lines) + "\n")


def _write(out_file: Path, dialogues: Sequence[Dialogue]) -> None:
    lines = [json.dumps(to_record(dialogue, out_file.parent), ensure_ascii=False) + "\n" for dialogue in dialogues]
    for dialogue, line in zip(dialogues, lines, strict=True):
        if len(line.encode()) > MAX_LINE_BYTES:
            raise DataError(
                f"{dialogue.source}: its line in {out_file} would have more than {MAX_LINE_BYTES} bytes, too many to "
                "read; write its audio to a file and give the path"
            )
    write_whole(out_file, "".join(lines))
