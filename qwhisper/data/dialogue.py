"""The canonical form of a dialogue, and the one place that reads it, finds its faults, and writes it.

Whatever is wrong with a file is found here, without tokenizer or model; a fault is a sentence with file and line.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qwhisper.data.audio_marks import place_audios
from qwhisper.data.clips import AudioClip, is_list, own_roots, quoted, raise_or_warn
from qwhisper.data.faults import grouped
from qwhisper.data.files import file_fault
from qwhisper.data.keys import unknown_keys
from qwhisper.data.messages import LOSS_KEYS, Message, join_calls, parse_learned, parse_messages
from qwhisper.data.not_jsonl import not_json_lines
from qwhisper.data.records import read_records
from qwhisper.data.tools import parse_tools
from qwhisper.data.waveform import data_url
from qwhisper.errors import DataError

MAX_LINES_SHOWN = 20
KNOWN = ("id", "messages", "audios", "system", "tools", *LOSS_KEYS)


def in_words(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The messages as typed text: each clip replaced with its transcript, with spaces towards its neighbours. None if
    any clip's transcript is missing or empty.
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
class Dialogue:
    """One dialogue; `source` says where it stands, as in `train.jsonl:12`.

    tools: the JSON text of each tool's schema, in OpenAI's form. unused: names of keys that were found and not used.
    """

    id: str
    messages: tuple[Message, ...]
    source: str
    tools: tuple[str, ...] = ()
    unused: tuple[str, ...] = field(default=(), compare=False)

    @property
    def has_tools(self) -> bool:
        """Whether a chat template needs a place for tools, their calls or their responses."""
        return bool(self.tools) or any(message.tool_calls or message.role == "tool" for message in self.messages)

    @property
    def clips(self) -> tuple[AudioClip, ...]:
        return tuple(clip for message in self.messages for clip in message.clips)


def read_dialogues(
    path: str | Path, *, data_root: str | Path | None = None, max_samples: int | None = None
) -> list[Dialogue]:
    """Read a JSONL file of dialogues, one a line, and refuse it as a whole if anything in it is wrong.

    Relative audio paths start at the file's folder; other paths must lie under `data_root` (default: the same folder).
    `max_samples` reads no further than that many dialogues. Raises DataError with file and line of the faults: the 20
    most frequent kinds, equal faults as one line.
    """
    dialogues, faults = scan_dialogues(path, data_root=data_root, max_samples=max_samples)
    refuse(faults, f"`qwhisper data check {path}` lists them all")
    return dialogues


def refuse(faults: Sequence[str], all_of_them: str) -> None:
    """Raise DataError if there are faults, see `read_dialogues`. all_of_them: the end of its last line, if it doesn't
    show all.
    """
    if faults:
        lines = grouped(faults)
        shown = lines[:MAX_LINES_SHOWN]
        if len(lines) > len(shown):
            shown.append(f"... and {len(lines) - len(shown)} more; {all_of_them}")
        raise DataError("\n".join(shown))


def scan_dialogues(
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    max_samples: int | None = None,
    answered: bool = True,
    convert: Callable[[dict], dict] | None = None,
) -> tuple[list[Dialogue], list[str]]:
    """The good dialogues of a file and every fault in it, each fault as `file:line: sentence`.

    answered: True: a dialogue without an answer is a fault; False: not if its last message awaits one. convert: turns
    a line's object of another form into the canonical one. Raises DataError only if there is no such file, or it isn't
    JSONL at all.
    """
    path = Path(path)
    if fault := file_fault(path):
        raise DataError(f"{path} {fault}: give a JSONL file with one dialogue a line")
    if fault := not_json_lines(path):
        raise DataError(f"{path} is {fault}")
    faults: list[str] = []
    records = ((source, convert(record) if convert and isinstance(record, dict) else record)
               for source, record in read_records(path))  # fmt: skip
    dialogues = list(islice(parse_records(records, path.parent, data_root, faults, answered=answered), max_samples))
    if not dialogues and not faults:
        faults.append(f"{path}: no dialogue in it; each line should be a JSON object with `messages`")
    return dialogues, faults


def parse_records(
    records: Iterable[tuple[str, dict | str]],
    root: str | Path,
    data_root: str | Path | None,
    faults: list[str],
    *,
    answered: bool = True,
) -> Iterator[Dialogue]:
    """Yield the good dialogues of records, each given with its source; `faults` takes a sentence for each fault.

    A text in place of a record is the fault of its line. See `parse_dialogue` and `scan_dialogues` for the rest.
    """
    first_seen: dict[str, str] = {}
    for source, record in records:
        if isinstance(record, str):
            faults.append(f"{source}: {record}")
            continue
        dialogue, found = _parse(record, source, Path(root), data_root, answered)
        faults += [f"{source}: {fault}" for fault in found]
        if dialogue is None:
            continue
        if dialogue.id in first_seen:
            identity = quoted.repr(dialogue.id)
            faults.append(f"{source}: id {identity} was used before, at {first_seen[dialogue.id]}")
            continue
        first_seen[dialogue.id] = source
        yield dialogue


def parse_dialogue(
    record: dict, source: str, root: str | Path, data_root: str | Path | None = None, *, answered: bool = True
) -> Dialogue:
    """One record in canonical form; `root` is the folder that relative audio paths start at. Raises DataError.

    answered: as in `scan_dialogues`.
    """
    dialogue, faults = _parse(record, source, Path(root), data_root, answered)
    if dialogue is None:
        raise DataError("\n".join(f"{source}: {fault}" for fault in faults))
    return dialogue


def parse_own(record: dict, source: str, *, answered: bool = True) -> Dialogue:
    """One record that a caller gives directly: relative paths start in the current folder, and any file may be read.

    Raises DataError, and warns of keys that are not used.
    """
    folder, everywhere = own_roots()
    dialogue = parse_dialogue(record, source, folder, everywhere, answered=answered)
    raise_or_warn([], dialogue.unused)
    return dialogue


def as_messages(messages: Sequence[Message | dict]) -> Sequence[Message]:
    """Messages as they are; or the messages of a prompt, of which the last is the user's, read as by `parse_own`."""
    read = [message for message in messages if isinstance(message, Message)]
    if len(read) == len(messages):
        return read
    return parse_own({"messages": messages}, "the prompt", answered=False).messages


def to_record(dialogue: Dialogue, folder: str | Path) -> dict[str, Any]:
    """The record that `parse_dialogue` reads as the same dialogue. Clips below `folder` get a relative path, and sound
    in memory a data URL.

    An id that is only the dialogue's place is left out.
    """
    root = Path(os.path.realpath(folder))
    identity = {} if dialogue.id == dialogue.source else {"id": dialogue.id}
    tools = {"tools": [json.loads(tool) for tool in dialogue.tools]} if dialogue.tools else {}
    return identity | tools | {"messages": [_message_record(message, root) for message in dialogue.messages]}


def _message_record(message: Message, root: Path) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else _clip_record(part, root)
        for part in message.content
    ]
    named = {
        "kind": message.kind,
        "reasoning_content": message.reasoning,
        "tool_calls": [call.record for call in message.tool_calls] or None,
        "loss": None if message.learned else False,
    }
    return {
        "role": message.role,
        "content": parts if message.clips else message.text,
        **{name: value for name, value in named.items() if value is not None},
    }


def _clip_record(clip: AudioClip, root: Path) -> dict[str, Any]:
    path = Path(clip.path)
    location = str(path.relative_to(root) if path.is_relative_to(root) else path)
    named = {"start": clip.start, "end": clip.end, "channel": clip.channel, "transcript": clip.transcript}
    source = location if clip.sound is None else data_url(clip.sound)
    return {"type": "audio", "audio": source} | {k: v for k, v in named.items() if v is not None}


def unused_notes(dialogues: Iterable[Dialogue]) -> list[str]:
    """A sentence for each unused key: how many dialogues have it, and where it is first."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for dialogue in dialogues:
        counts.update(dialogue.unused)
        for key in dialogue.unused:
            first.setdefault(key, dialogue.source)
    notes = [
        f"dialogues with the key {key}, which is not used: {n}; first at {first[key]}" for key, n in counts.items()
    ]
    if len(notes) > MAX_LINES_SHOWN:
        notes[MAX_LINES_SHOWN:] = [f"and {len(notes) - MAX_LINES_SHOWN} more keys that are not used"]
    return notes


def _parse(
    record: dict, source: str, root: Path, data_root, answered: bool = True
) -> tuple[Dialogue | None, list[str]]:
    """The dialogue, or None and what is wrong with it."""
    faults, others = unknown_keys(record, KNOWN, "the dialogue")
    unused = [f"`{key}`" for key in others]
    raw = record.get("messages")
    if not is_list(raw):
        return None, faults or [
            "no `messages` list: the canonical form is {'messages': [{'role': …, 'content': …}, …]}"
        ]
    if len(raw) == 0:
        return None, [*faults, "the dialogue is empty: `messages` has no entry"]
    roots = [root] if data_root is None else [root, Path(data_root)]
    if parse_learned(record, "the dialogue", faults) is False:
        faults.append("the whole dialogue is not to be learned; leave it out, or mark single answers")
    tools = parse_tools(record.get("tools"), faults)
    messages = parse_messages(raw, roots, faults, unused)
    if not faults and not answered and all(message.role == "system" for message in messages):
        faults.append("no user message: there is nothing to answer")
    if not faults and (answered or messages[-1].role not in ("user", "tool")):
        _check_answers(messages, faults)
    messages = place_audios(messages, record.get("audios"), roots, faults, unused)
    identity = record.get("id")
    if isinstance(identity, dict | list):
        faults.append(f"`id` must be a text or a number, not {type(identity).__name__}")
    if not faults:
        messages = _with_system(join_calls(messages, raw, faults), record.get("system"), faults)
    if faults:
        return None, faults
    name = source if identity is None else str(identity)
    return Dialogue(name, tuple(messages), source, tools, tuple(dict.fromkeys(unused))), []


def _check_answers(messages: Sequence[Message], faults: list[str]) -> None:
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        faults.append("no assistant message: there is nothing to learn from")
    elif not any(answer.learned for answer in answers):
        faults.append("`loss`, `train` or `weight` mask every answer: there is nothing to learn from")


def _with_system(messages: list[Message], system: object, faults: list[str]) -> list[Message]:
    """The messages with the record's own `system` before them, if it is not there already."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        faults.append(f"`system` must be a text, not {type(system).__name__}")
        return messages
    there = [message for message in messages if message.role == "system"]
    if not there:
        return [Message("system", (system,)), *messages]
    if len(there) > 1 or there[0].clips or there[0].text.strip() != system.strip():
        faults.append("`system` and the system message differ; keep one")
    return messages
