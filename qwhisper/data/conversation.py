"""The canonical form of a dialogue, and the one place that reads it, finds its faults, and writes it.

Whatever is wrong with a file is found here, without tokenizer or model; a fault is a sentence with file and line.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwhisper.data.clips import AudioClip, parse_part, quoted, resolve_path
from qwhisper.data.files import file_fault
from qwhisper.errors import DataError

ROLES = ("system", "user", "assistant")
AUDIO_MARKS = ("<audio>", "<|audio_pad|>")  # ms-swift's placeholder, and the token that a rendered text has for audio
MAX_FAULTS_SHOWN = 20
MAX_LINE_BYTES = 2**24  # 16 MiB of text in one dialogue; a file without line breaks would be one line of any length
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Message:
    """One turn. `kind` is an optional type of question, by which evaluation groups; `reasoning` precedes the answer."""

    role: str
    content: tuple[str | AudioClip, ...]
    kind: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def clips(self) -> tuple[AudioClip, ...]:
        return tuple(part for part in self.content if isinstance(part, AudioClip))


def in_words(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The messages as one would type them: each clip's transcript in its place, with a space towards what stands beside
    it. None where a clip has no transcript, or an empty one.
    """
    if any(not (clip.transcript or "").strip() for message in messages for clip in message.clips):
        return None
    return tuple(replace(message, content=(_typed(message.content),)) for message in messages)


def _typed(content: Sequence[str | AudioClip]) -> str:
    text = ""
    for part, before in zip(content, (None, *content), strict=False):
        said = part if isinstance(part, str) else part.transcript or ""
        apart = not text or text[-1].isspace() or said[:1].isspace()
        beside_clip = isinstance(part, AudioClip) or isinstance(before, AudioClip)
        text += f" {said}" if beside_clip and not apart else said
    return text


@dataclass(frozen=True)
class Conversation:
    """One dialogue; `source` says where it stands, as in `train.jsonl:12`."""

    id: str
    messages: tuple[Message, ...]
    source: str

    @property
    def clips(self) -> tuple[AudioClip, ...]:
        return tuple(clip for message in self.messages for clip in message.clips)


def read_conversations(
    path: str | Path, *, data_root: str | Path | None = None, max_samples: int | None = None
) -> list[Conversation]:
    """Read a JSONL file of dialogues, one a line, and refuse it as a whole if anything in it is wrong.

    Relative audio paths start at the file's folder; other paths must lie under `data_root` (default: the same folder).
    `max_samples` reads no further than that many dialogues. Raises DataError with file and line of the first 20 faults.
    """
    conversations, faults = scan_conversations(path, data_root=data_root, max_samples=max_samples)
    if faults:
        shown = faults[:MAX_FAULTS_SHOWN]
        if len(faults) > len(shown):
            shown.append(f"... and {len(faults) - len(shown)} more; `qwhisper data check {path}` lists them all")
        raise DataError("\n".join(shown))
    return conversations


def scan_conversations(
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    max_samples: int | None = None,
    answered: bool = True,
    convert: Callable[[dict], dict] | None = None,
) -> tuple[list[Conversation], list[str]]:
    """The good dialogues of a file and every fault in it, each fault as `file:line: sentence`.

    answered: a dialogue without any answer is a fault; False: not where a user's message ends it. convert: what makes
    the canonical form of a line's object that has another. Raises DataError only if there is no such file.
    """
    path = Path(path)
    if fault := file_fault(path):
        raise DataError(f"{path} {fault}: give a JSONL file with one dialogue a line")
    conversations: list[Conversation] = []
    faults: list[str] = []
    first_seen: dict[str, str] = {}
    for source, record in _records(path):
        if isinstance(record, str):
            faults.append(f"{source}: {record}")
            continue
        record = convert(record) if convert else record
        conversation, found = _parse(record, source, path.parent, data_root, answered)
        faults += [f"{source}: {fault}" for fault in found]
        if conversation is None:
            continue
        if conversation.id in first_seen:
            identity = quoted.repr(conversation.id)
            faults.append(f"{source}: id {identity} was used before, at {first_seen[conversation.id]}")
            continue
        first_seen[conversation.id] = source
        conversations.append(conversation)
        if len(conversations) == max_samples:
            break
    if not conversations and not faults:
        faults.append(f"{path}: no dialogue in it; each line should be a JSON object with `messages`")
    return conversations, faults


def parse_conversation(
    record: dict, source: str, root: str | Path, data_root: str | Path | None = None
) -> Conversation:
    """One record in canonical form; `root` is the folder that relative audio paths start at. Raises DataError."""
    conversation, faults = _parse(record, source, Path(root), data_root)
    if conversation is None:
        raise DataError("\n".join(f"{source}: {fault}" for fault in faults))
    return conversation


def to_record(conversation: Conversation, folder: str | Path) -> dict[str, Any]:
    """What `parse_conversation` reads the same dialogue from; clips below `folder` stand there by their relative path.

    An id that was only the place where the dialogue stood is left out.
    """
    root = Path(os.path.realpath(folder))
    identity = {} if conversation.id == conversation.source else {"id": conversation.id}
    return identity | {"messages": [_message_record(message, root) for message in conversation.messages]}


def _message_record(message: Message, root: Path) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else _clip_record(part, root)
        for part in message.content
    ]
    named = {"kind": message.kind, "reasoning_content": message.reasoning}
    return {
        "role": message.role,
        "content": parts if message.clips else message.text,
        **{name: value for name, value in named.items() if value is not None},
    }


def _clip_record(clip: AudioClip, root: Path) -> dict[str, Any]:
    path = Path(clip.path)
    location = path.relative_to(root) if path.is_relative_to(root) else path
    named = {"start": clip.start, "end": clip.end, "transcript": clip.transcript}
    return {"type": "audio", "audio": str(location)} | {k: v for k, v in named.items() if v is not None}


def _records(path: Path) -> Iterator[tuple[str, dict | str]]:
    """(source, record) of each line that is not blank; a line that is no JSON object gives its fault instead."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            source = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                yield source, f"longer than {MAX_LINE_BYTES} bytes; each line should be one dialogue"
                while line and not line.endswith(b"\n"):
                    line = file.readline(2**16)
                continue
            record = _record(line, "utf-8-sig" if number == 1 else "utf-8")
            if record is not None:
                yield source, record


def _record(line: bytes, encoding: str) -> dict | str | None:
    """The object in a line, or what is wrong with it; None where it is blank."""
    try:
        text = line.decode(encoding).strip()
        record = json.loads(text) if text else None
        if SURROGATE_ESCAPE.search(text):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair, \\u{ord(error.object[error.start]):x}, which is no character: mend the text"
    except RecursionError:
        return "not valid JSON (nested too deeply)"
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text[error.pos] == "{":
            # `cat` makes such a line of two files, the first of which does not end with a line break.
            return f"two objects stand on one line: a line break is probably missing before character {error.pos + 1}"
        return f"not valid JSON ({error})"
    return record if isinstance(record, dict) or not text else "not a JSON object with `messages`"


def _parse(
    record: dict, source: str, root: Path, data_root, answered: bool = True
) -> tuple[Conversation | None, list[str]]:
    """The conversation, or None and what is wrong with it."""
    raw = record.get("messages")
    if not isinstance(raw, list):
        return None, ["no `messages` list: the canonical form is {'messages': [{'role': …, 'content': …}, …]}"]
    if not raw:
        return None, ["the dialogue is empty: `messages` has no entry"]
    roots = [root] if data_root is None else [root, Path(data_root)]
    faults: list[str] = []
    messages = [_parse_message(message, f"message {n}", roots, faults) for n, message in enumerate(raw, 1)]
    is_question = not answered and messages[-1].role == "user"
    if not is_question and not any(message.role == "assistant" for message in messages) and not faults:
        faults.append("no assistant message: there is nothing to learn from")
    messages = _place_audios(messages, record.get("audios"), roots, faults)
    identity = record.get("id")
    if isinstance(identity, dict | list):
        faults.append(f"`id` must be a text or a number, not {type(identity).__name__}")
    if faults:
        return None, faults
    return Conversation(source if identity is None else str(identity), tuple(messages), source), []


def _parse_message(raw: object, where: str, roots: list[Path], faults: list[str]) -> Message:
    if not isinstance(raw, dict):
        faults.append(f"{where} is not an object with `role` and `content`")
        return Message("?", ())
    role, content, faults_before = raw.get("role"), raw.get("content"), len(faults)
    if role not in ROLES:
        faults.append(f"{where}: unknown role {quoted.repr(role)}; known are {', '.join(ROLES)}")
        role = "?"
    if isinstance(content, str):
        parts: list[str | AudioClip] = [content]
    elif isinstance(content, list):
        parts = [parse_part(part, f"{where}, part {n}", roots, faults) for n, part in enumerate(content, 1)]
    else:
        faults.append(f"{where}: `content` must be a text or a list of parts, not {type(content).__name__}")
        return Message(role, ())
    kind = raw.get("kind")
    if isinstance(kind, dict | list):
        faults.append(f"{where}: `kind` must be a text, not {type(kind).__name__}")
        kind = None
    message = Message(role, tuple(parts), kind=None if kind is None else str(kind))
    if len(faults) > faults_before:  # what is missing because of them is no fault of its own
        return message
    if role == "assistant":
        return _parse_answer(message, raw.get("reasoning_content"), where, faults)
    if role == "user" and not message.clips and not message.text.strip():
        faults.append(f"{where}: the user message is empty")
    return message


def _parse_answer(message: Message, reasoning: object, where: str, faults: list[str]) -> Message:
    """An assistant message, its reasoning apart from the reply; a leading <think> block counts as reasoning."""
    if message.clips:
        faults.append(f"{where}: an assistant message holds audio, but answers are text")
    text = message.text.strip()
    if text.startswith("<think>") and "</think>" in text:
        thought, text = text.removeprefix("<think>").split("</think>", 1)
        reasoning = reasoning or thought
    text = text.strip()
    if not text:
        faults.append(f"{where}: the assistant's reply is empty")
    if reasoning is not None and not isinstance(reasoning, str):
        faults.append(f"{where}: `reasoning_content` must be a text, not {type(reasoning).__name__}")
        reasoning = None
    return replace(message, content=(text,), reasoning=(reasoning or "").strip() or None)


def _place_audios(messages: list[Message], audios: object, roots: list[Path], faults: list[str]) -> list[Message]:
    """Put ms-swift's `audios` where `<audio>` stands in the text; without `audios` no mark may stand there.

    What an assistant writes is never searched: an answer may speak of HTML's <audio>.
    """
    if audios is None:
        for number, message in enumerate(messages, 1):
            mark = next((mark for mark in AUDIO_MARKS if message.role != "assistant" and mark in message.text), None)
            if mark:
                faults.append(
                    f"message {number}: the text holds the placeholder {mark} without audio; "
                    "write {'type': 'audio', 'audio': …} or give `audios`"
                )
        return messages
    audios = [audios] if isinstance(audios, str) else audios
    if not isinstance(audios, list) or not all(isinstance(audio, str) for audio in audios):
        faults.append("`audios` must be a list of file names")
        return messages
    marks = sum(message.text.count("<audio>") for message in messages if message.role != "assistant")
    if marks != len(audios):
        lack = "audio without a placeholder" if marks < len(audios) else "a placeholder without audio"
        faults.append(f"{marks} <audio> in the text but {len(audios)} in `audios`: {lack}")
        return messages
    clips = iter([AudioClip(resolve_path(audio, f"audio {n}", roots, faults)) for n, audio in enumerate(audios, 1)])
    return [message if message.role == "assistant" else _fill_marks(message, clips) for message in messages]


def _fill_marks(message: Message, clips: Iterator[AudioClip]) -> Message:
    parts: list[str | AudioClip] = []
    for part in message.content:
        texts = part.split("<audio>") if isinstance(part, str) else []
        parts += [part] if not texts else texts[:1]
        for text in texts[1:]:
            parts += [next(clips), text]
    return replace(message, content=tuple(part for part in parts if part != ""))
