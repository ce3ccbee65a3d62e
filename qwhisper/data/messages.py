"""A message of a dialogue, and its reader, which finds its faults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwhisper.data.clips import AudioClip, parse_content, quoted
from qwhisper.data.keys import IN_MESSAGE, unknown_keys
from qwhisper.data.tools import ToolCall, parse_tool_calls, split_calls

# Roles as written in files. OpenAI's "developer" is the system; ms-swift has roles for calls and for their responses.
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "tool_call": "assistant",
    "tool_response": "tool",
}
LOSS_KEYS = ("loss", "train", "weight")  # of ms-swift, axolotl and OpenAI
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
ANSWER_KEYS = (*REASONING_KEYS, "tool_calls")
KNOWN = ("role", "content", "kind", "tool_call_id", *LOSS_KEYS, *ANSWER_KEYS)
THINK_MARKS = ("<think>", "</think>")
# What chat templates write after an answer. (Without `</s>`, which is also HTML.)
END_MARKS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Message:
    """One turn; its role is "system", "user", "assistant" or "tool" (a tool's response).

    kind: an optional type of question, by which evaluation groups. reasoning: precedes the answer. tool_calls: follow
    the answer's text, which may then be empty. learned: False masks the message in training; True leaves it to
    `train_on` whether its role is learned.
    """

    role: str
    content: tuple[str | AudioClip, ...]
    kind: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    learned: bool = True

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def clips(self) -> tuple[AudioClip, ...]:
        return tuple(part for part in self.content if isinstance(part, AudioClip))

    @property
    def is_answer(self) -> bool:
        """Whether there is something to learn: a text or a call of the assistant."""
        return self.role == "assistant" and bool(self.text.strip() or self.tool_calls)


def parse_messages(raw: Sequence, roots: list[Path], faults: list[str], unused: list[str]) -> list[Message]:
    """One message for each of `raw`; faults and unused keys are appended to the lists."""
    messages = [_parse_message(item, f"message {n}", roots, faults, unused) for n, item in enumerate(raw, 1)]
    if any(message.role == "tool" for message in messages):
        _check_call_ids(raw, faults)
    return messages


def join_calls(messages: Sequence[Message], raw: Sequence, faults: list[str]) -> list[Message]:
    """Merge ms-swift's `tool_call` messages into the answer before them. raw: the records of the messages."""
    joined: list[Message] = []
    for number, (message, item) in enumerate(zip(messages, raw, strict=True), 1):
        before = joined[-1] if joined else None
        if before is None or before.role != "assistant" or item.get("role") != "tool_call":
            joined.append(message)
            continue
        if message.learned != before.learned or message.reasoning:
            faults.append(f"message {number}: belongs to the answer before it: give `loss` and reasoning there")
        joined[-1] = replace(before, tool_calls=before.tool_calls + message.tool_calls)
    return joined


def parse_learned(raw: dict, where: str, faults: list[str]) -> bool | None:
    """Whether an object is to be learned, by `loss`, `train` and `weight`; None if it has none of them."""
    said = {key: raw[key] for key in LOSS_KEYS if raw.get(key) is not None}
    if not said:  # as in most messages
        return None
    for key, value in said.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            faults.append(
                f"{where}: `{key}` is {quoted.repr(value)}; it can be true or 1, false or 0, nothing in between"
            )
            return None
    if len({bool(value) for value in said.values()}) > 1:
        faults.append(f"{where}: {' and '.join(f'`{key}` {said[key]}' for key in said)} contradict each other")
        return None
    return bool(next(iter(said.values())))


def _parse_message(raw: object, where: str, roots: list[Path], faults: list[str], unused: list[str]) -> Message:
    if not isinstance(raw, dict):
        faults.append(f"{where} is not an object with `role` and `content`")
        return Message("?", ())
    faults_before = len(faults)
    wrong_keys, others = unknown_keys(raw, KNOWN, where, IN_MESSAGE)
    faults += wrong_keys
    unused += [f"`{key}` in a message" for key in others]
    written, content = raw.get("role"), raw.get("content")
    role = ROLES.get(written, "?") if isinstance(written, str) else "?"
    if role == "?" and not (written is None and wrong_keys):
        faults.append(f"{where}: unknown role {quoted.repr(written)}; known are {', '.join(ROLES)}")
    calls = parse_tool_calls(raw.get("tool_calls"), where, faults)
    if written == "tool_call":
        calls, content = calls + parse_tool_calls(content, where, faults), ""
        if not calls and len(faults) == faults_before:
            faults.append(f"{where}: no tool call in its `content`")
    elif content is None and (calls or (written == "tool" and "content" in raw)):
        content = ""
    missing_explained = content is None and bool(wrong_keys)
    parts = () if missing_explained else _joined(parse_content(content, where, roots, faults, unused))
    kind = raw.get("kind")
    if isinstance(kind, dict | list):
        faults.append(f"{where}: `kind` must be a text, not {type(kind).__name__}")
    learned = parse_learned(raw, where, faults)
    if learned and role not in ("assistant", "?"):
        faults.append(
            f"{where}: only an assistant's message can be learned by itself; --train_on all learns users' text"
        )
    message = Message(role, parts, None if kind is None else str(kind), None, calls, learned is not False)
    if len(faults) > faults_before:  # what is missing because of them is not a second fault
        return message
    if role == "assistant":
        return parse_answer(message, raw, where, faults)
    _check_question(message, raw, where, faults)
    return message


def _joined(parts: Sequence[str | AudioClip]) -> tuple[str | AudioClip, ...]:
    """Texts and clips in order, neighbouring texts joined."""
    joined: list[str | AudioClip] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part != "":
            joined.append(part)
    return tuple(joined)


def parse_answer(message: Message, raw: dict, where: str, faults: list[str]) -> Message:
    """An assistant's message, with reasoning and calls separated from the text."""
    if message.clips:
        faults.append(f"{where}: an assistant message holds audio, but answers are text")
    thought, text = split_thought(message.text.strip(), where, faults)
    text, more_calls = split_calls(text, where, faults)
    reasoning = parse_reasoning(raw, where, faults, thought)
    calls = message.tool_calls + more_calls
    if text.endswith(END_MARKS):
        faults.append(f"{where}: the answer ends with a control token, which the chat template writes; leave it out")
    if not text and not calls:
        faults.append(f"{where}: the assistant's reply is empty")
    return replace(message, content=(text,) if text else (), reasoning=reasoning, tool_calls=calls)


def split_thought(text: str, where: str, faults: list[str]) -> tuple[str, str]:
    """The block of reasoning before an answer, and the answer.

    A block may lack its first mark: if the chat template writes `<think>` itself, a copied answer does not have it.
    """
    thought, mark, answer = text.partition("</think>")
    if not mark:
        thought, answer = "", text
    thought, answer = thought.removeprefix("<think>").strip(), answer.strip()
    if any(tag in part for tag in THINK_MARKS for part in (thought, answer)):
        state = "" if "</think>" in text else ", which is never closed"
        faults.append(
            f"{where}: the answer holds a mark of reasoning{state}; reasoning is one <think>…</think> block before the "
            "answer, or stands in `reasoning_content`"
        )
    return thought, answer


def parse_reasoning(raw: Mapping, where: str, faults: list[str], thought: str = "") -> str | None:
    """The reasoning of an assistant's message. thought: the block of reasoning at the beginning of its text."""
    given = {key: raw[key] for key in REASONING_KEYS if raw.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            faults.append(f"{where}: `{key}` must be a text, not {type(value).__name__}")
            return None
        if any(mark in value for mark in THINK_MARKS):
            faults.append(f"{where}: `{key}` holds {' or '.join(THINK_MARKS)}; leave the marks out")
    texts = {key: value.strip() for key, value in given.items() if value.strip()}
    texts |= {"the answer's <think> block": thought} if thought else {}
    if len(set(texts.values())) > 1:
        faults.append(f"{where}: {' and '.join(texts)} differ; keep one")
    return next(iter(texts.values()), None)


def _check_question(message: Message, raw: dict, where: str, faults: list[str]) -> None:
    """The faults of a message that is no answer."""
    faults += [f"{where}: `{key}` belongs to an assistant's message" for key in ANSWER_KEYS if raw.get(key)]
    if message.role == "tool" and message.clips:
        faults.append(f"{where}: a tool's response must be text, not audio")
    text = message.text.strip()
    if message.role == "user" and not message.clips and not text:
        faults.append(f"{where}: the user message is empty")
    if message.role == "user" and text.startswith("<tool_response>"):
        faults.append(f"{where}: a tool's response in a user's text; give it a message with the role `tool`")


def _check_call_ids(raw: Sequence[object], faults: list[str]) -> None:
    """Check the order of responses: chat templates match calls and responses by order only, and other ids would be
    lost.
    """
    awaited: list[object] = []
    for number, message in enumerate(raw, 1):
        if not isinstance(message, dict):
            continue
        if ROLES.get(str(message.get("role"))) != "tool":
            calls = message.get("tool_calls")
            awaited = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
            continue
        identity, awaited_now, awaited = message.get("tool_call_id"), awaited[:1], awaited[1:]
        if identity is not None and awaited_now[:1] not in ([identity], [None]):
            expected = quoted.repr(awaited_now[0]) if awaited_now else "none"
            faults.append(
                f"message {number}: `tool_call_id` {quoted.repr(identity)}, but the call awaited here is {expected}; "
                "put the responses in the order of their calls"
            )
