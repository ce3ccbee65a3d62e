"""Chat templates that can listen, and the pieces that a dialogue is rendered into.

Training and serving use the same template: rendered up to any assistant turn, with its generation prompt, it gives a
prefix of the whole dialogue. Qwen3's own does not: it writes its empty think block only in the last turn.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from qwhisper.data.clips import AudioClip
from qwhisper.data.messages import Message
from qwhisper.data.template_texts import (
    AUDIO_TOKEN,
    PLAIN,
    PREAMBLE,
    QWEN3_EVERY_TURN,
    QWEN3_HISTORY,
    QWEN3_LAST_TURN,
)
from qwhisper.data.text_tokens import added_token_ids, typed_tokens
from qwhisper.data.tools import ToolCall
from qwhisper.data.try_template import cost_fault
from qwhisper.errors import DataError, UsageError

# Role patterns (first letters) that a template is tried on.
PROBES = ("ua", "uaua", "uauaua", "suaua")
ROLE_OF = {"s": "system", "u": "user", "a": "assistant"}
# Marks that stand for the contents while a template is rendered, so that no content is ever read as template text.
MARK = re.compile("\ue000([cr])(\\d+)\ue001")


class Slot(NamedTuple):
    """All that the rendering of a message depends on. has_text: False only for an answer that has only calls."""

    role: str
    has_reasoning: bool = False
    has_text: bool = True
    calls: tuple[ToolCall, ...] = ()


Pattern = tuple[Slot, ...]


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered dialogue.

    kind: "scaffold" (the template's own text), "text" or "audio" (from the messages). message_index: the message that
    it belongs to; None for scaffold, except for text that the assistant writes itself (think marks, tool calls), which
    belongs to its turn.
    """

    kind: str
    text: str
    message_index: int | None = None
    clip: AudioClip | None = None


def listening_template(tokenizer) -> tuple[str, str]:
    """(chat template to train with and to save with the processor, its origin in one line).

    The first that works: the tokenizer's own template if it is prefix-stable; Qwen3's, patched; a table of the texts
    that the tokenizer's own template writes between turns. A plain one if the tokenizer has none. Raises UsageError if
    nothing works.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _checked(tokenizer, PREAMBLE + PLAIN), "a plain User/Assistant template, since the tokenizer has none"
    own = tokenizer.get_chat_template()
    refuse_costly(own)
    own = own if own.startswith(PREAMBLE) else PREAMBLE + own
    if template_fault(tokenizer, own) is None:
        return own, "the tokenizer's own chat template"
    patched = own.replace(QWEN3_HISTORY, QWEN3_EVERY_TURN).replace(QWEN3_LAST_TURN, "{%- if true %}")
    if patched != own and template_fault(tokenizer, patched) is None:
        return patched, "the tokenizer's own chat template, with its think block in every assistant turn"
    table = PREAMBLE + _table_template(tokenizer, own)
    return _checked(tokenizer, table), "a table of turns probed from the tokenizer's own chat template"


def refuse_costly(chat_template: str) -> None:
    """Raise UsageError for a template that takes too long or too much memory, or writes too much."""
    if (fault := cost_fault(chat_template)) is not None:
        raise UsageError(f"the chat template can't be used: {fault}")


def template_fault(tokenizer, chat_template: str) -> str | None:
    """Why a template can't be trained with, or None: tried on one to three turns, with and without a system message."""
    for probe in PROBES:
        roles = [ROLE_OF[letter] for letter in probe]
        try:
            _render(tokenizer, chat_template, tuple(map(Slot, roles)), False)
        except DataError as error:
            if roles[0] == "system":
                continue  # some templates know no system message; a dialogue that has one is refused by name later
            return str(error)
        try:
            render_pieces([Message(role, (role,)) for role in roles], tokenizer, chat_template, False)
            end_of_turn_ids(tokenizer, chat_template)
        except (DataError, UsageError) as error:
            return str(error)
    return None


def render_pieces(
    messages: Sequence[Message],
    tokenizer,
    chat_template: str,
    add_generation_prompt: bool = False,
    tools: Sequence[str] = (),
) -> list[Piece]:
    """A dialogue as scaffold, texts and clips in their order; contents are stripped. tools: the JSON text of each.

    The pieces before the first one of an assistant turn are exactly those of the generation prompt at that turn.
    Raises DataError if the template refuses the dialogue, drops a message or is not prefix-stable.
    """
    with_tools = bool(tools) or any(message.tool_calls or message.role == "tool" for message in messages)
    if with_tools:
        messages = _without_past_reasoning(messages)
    pattern = tuple(
        Slot(m.role, m.reasoning is not None, bool(m.text.strip()) or not m.tool_calls, m.tool_calls) for m in messages
    )
    if with_tools:
        _check_typed(tokenizer, pattern, tools)
        # Not from the cache: hardly any other dialogue has the same tools and calls, whose texts are long.
        segments = _segments.__wrapped__(tokenizer, chat_template, pattern, add_generation_prompt, tuple(tools))
        _check_rendered(segments, pattern, tools)
    else:
        segments = _segments(tokenizer, chat_template, pattern, add_generation_prompt)
    pieces = []
    for kind, text, index in segments:
        if kind == "scaffold":
            pieces.append(Piece("scaffold", text, index))
        elif kind == "r":
            pieces.append(Piece("text", messages[index].reasoning or "", index))
        else:
            pieces += _content_pieces(messages[index].content, index)
    return list(_with_space_in_texts(pieces)) if with_tools else pieces


def _without_past_reasoning(messages: Sequence[Message]) -> list[Message]:
    """The messages without reasoning before the last question.

    Qwen3's template keeps reasoning across calls and responses, and drops it after the next question: in a row with
    both, an earlier answer would have a different history.
    """
    asked = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
    return [replace(m, reasoning=None) if index < asked else m for index, m in enumerate(messages)]


def supports_reasoning(tokenizer, chat_template: str) -> bool:
    """Whether the template has a place for `reasoning_content`."""
    segments = _segments(tokenizer, chat_template, (Slot("user"), Slot("assistant", has_reasoning=True)), False)
    return any(kind == "r" for kind, _, _ in segments)


def _check_typed(tokenizer, pattern: Pattern, tools: Sequence[str]) -> None:
    """Refuse tools and calls whose rendered text would hold a control token or a mark."""
    if pattern[0].calls:
        raise DataError("the first message calls a tool, but answers no question")
    for text in (*tools, *(f"{call.name} {call.arguments}" for slot in pattern for call in slot.calls)):
        found = [*typed_tokens(tokenizer, text), *("a private-use character" for _ in MARK.finditer(text))]
        if found:
            raise DataError(
                f"a tool or a tool call holds {found[0]}, which would be read as a control token; change it"
            )


def _check_rendered(segments: Sequence[tuple], pattern: Pattern, tools: Sequence[str]) -> None:
    """Refuse a rendering that lacks a tool, or a call in the answer that it belongs to."""
    scaffold = "".join(text for _, text, _ in segments)
    lacking = [name for tool in tools if (name := json.loads(tool)["function"]["name"]) not in scaffold]
    for index, slot in enumerate(pattern):
        own = "".join(text for _, text, owner in segments if owner == index)
        lacking += [call.name for call in slot.calls if call.name not in own or call.arguments not in own]
    if lacking:
        raise DataError(f"the chat template has no place for tools: it leaves out {lacking[0]}; change --text_model")


def end_of_turn_ids(tokenizer, chat_template: str) -> list[int]:
    """Tokens that end an answer in generation: the one that closes an assistant turn, then the tokenizer's eos.

    Raises UsageError if no added token closes the turn: a model could never learn to stop.
    """
    ends = _closing_ids(tokenizer, chat_template)
    if not ends:
        raise UsageError("no special token ends an assistant turn in this chat template: let it write eos_token there")
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def _closing_ids(tokenizer, chat_template: str) -> list[int]:
    """The token that closes an assistant turn, as a list; empty if there is none."""
    kind, text, _ = _segments(tokenizer, chat_template, (Slot("user"), Slot("assistant")), False)[-1]
    added = added_token_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if kind == "scaffold" else []
    return [i for i in ids if i in added][:1]


def _content_pieces(content: Sequence[str | AudioClip], index: int) -> list[Piece]:
    parts: list[str | AudioClip] = []
    for part in content:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    pieces = []
    for n, part in enumerate(parts):
        if isinstance(part, AudioClip):
            pieces.append(Piece("audio", AUDIO_TOKEN, index, part))
            continue
        text = part.lstrip() if n == 0 else part
        text = text.rstrip() if n == len(parts) - 1 else text
        if text:
            pieces.append(Piece("text", text, index))
    return pieces


def _with_space_in_texts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Move the white space between a message's text and the scaffold behind it to the text.

    Around tools a template writes a line break behind contents, and a tokenizer joins it with the text before: training
    must see the same tokens as when the whole prompt is tokenised at once.
    """
    space = ""
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        text = piece.text.removeprefix(space)
        space = ""
        if piece.kind == "text" and following is not None and following.kind == "scaffold":
            space = following.text[: len(following.text) - len(following.text.lstrip())]
        if text + space:
            yield replace(piece, text=text + space)


@lru_cache(maxsize=4096)
def _segments(
    tokenizer, chat_template: str, pattern: Pattern, add_generation_prompt: bool, tools: tuple[str, ...] = ()
) -> tuple:
    """(kind, text, message index) of a rendering: kind "scaffold", "c" (a message's content) or "r" (its reasoning).

    Scaffold is cut where a generation prompt ends, so that the text after it is tokenised as in generation, and where
    an answer with tool calls ends.
    """
    text = _render(tokenizer, chat_template, pattern, add_generation_prompt, tools=tools)
    marks = list(MARK.finditer(text))
    contents = [int(mark[2]) for mark in marks if mark[1] == "c"]
    expected = [index for index, slot in enumerate(pattern) if slot.has_text]
    if contents != expected:
        raise DataError(f"the chat template drops, repeats or moves messages: of {len(expected)} it renders {contents}")
    own_from: dict[int, int | None] = {}
    for index, slot in enumerate(pattern):
        if slot.role != "assistant" or index == 0:
            continue
        thinking = any(mark[1] == "r" and int(mark[2]) == index for mark in marks)
        prompt = _render(tokenizer, chat_template, pattern[:index], True, thinking, tools)
        if not text.startswith(prompt):
            raise DataError(f"the chat template is not prefix-stable: message {index + 1} does not follow its prompt")
        own_from[len(prompt)] = index
        if slot.calls:
            behind = next((mark.start() for mark in marks if int(mark[2]) > index), len(text))
            own_from[_end_of_calls(tokenizer, chat_template, text, len(prompt), behind)] = None
    return tuple(_split(text, marks, own_from, {index for index, slot in enumerate(pattern) if slot.calls}))


def _end_of_calls(tokenizer, chat_template: str, text: str, start: int, stop: int) -> int:
    """Position, between `start` and `stop`, of the token that closes a turn; contents and calls hold no such token."""
    closing = tokenizer.convert_ids_to_tokens(_closing_ids(tokenizer, chat_template))
    end = text.find(closing[0], start, stop) if closing else -1
    if end < 0:
        raise DataError("the chat template ends an answer with tool calls by another token than one without")
    return end


def _split(
    text: str, marks: list[re.Match], own_from: dict[int, int | None], calling: set[int]
) -> Iterator[tuple[str, str, int | None]]:
    """Cut a rendering at its marks and where the owner of the scaffold changes.

    own_from: offset -> index of the turn that owns the scaffold from there on, None for the template. calling: answers
    with tool calls.
    """
    position, own_turn = 0, None
    for mark in [*marks, None]:
        end = mark.start() if mark else len(text)
        for cut in sorted(cut for cut in own_from if position <= cut <= end):
            if cut > position:
                yield "scaffold", text[position:cut], own_turn
            position, own_turn = cut, own_from[cut]
        if end > position:
            yield "scaffold", text[position:end], own_turn
        if mark:
            index = int(mark[2])
            yield mark[1], "", index
            own_turn = own_turn if mark[1] == "r" or index in calling else None
            position = mark.end()


def _render(
    tokenizer,
    chat_template: str,
    pattern: Pattern,
    add_generation_prompt: bool,
    thinking: bool = False,
    tools: Sequence[str] = (),
) -> str:
    messages = []
    for index, slot in enumerate(pattern):
        message: dict = {"role": slot.role, "content": f"\ue000c{index}\ue001" if slot.has_text else ""}
        if slot.has_reasoning:
            message["reasoning_content"] = f"\ue000r{index}\ue001"
        if slot.calls:
            message["tool_calls"] = [call.record for call in slot.calls]
        messages.append(message)
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=[json.loads(tool) for tool in tools] or None,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
        )
    except Exception as error:  # a template is a program, and fails as programs do
        if isinstance(error, MemoryError):
            raise
        roles = ", ".join(slot.role for slot in pattern)
        raise DataError(f"the chat template refuses a dialogue of {roles}: {error}") from error


def _checked(tokenizer, chat_template: str) -> str:
    fault = template_fault(tokenizer, chat_template)
    if fault:
        raise UsageError(f"no usable chat template for {tokenizer.name_or_path or 'this tokenizer'}: {fault}")
    return chat_template


def _table_template(tokenizer, own: str) -> str:
    """A template that writes between any two turns what `own` writes there, in a prompt or else in a dialogue."""
    between: dict[str, str] = {}
    for probe in PROBES:
        roles = [ROLE_OF[letter] for letter in probe]
        for length in range(1, len(roles) + 1):
            for generate in (False, True):
                _probe_between(tokenizer, own, roles[:length], generate, between)
    ending = tokenizer(between.get("assistant>end", ""), add_special_tokens=False)["input_ids"]
    if not added_token_ids(tokenizer).intersection(ending):  # no token by which an answer ends: add one
        for key in [key for key in between if key.startswith("assistant>")]:
            between[key] = (tokenizer.eos_token or "") + between[key]
    table = json.dumps(between, ensure_ascii=False)
    return (
        f"{{%- set between = {table} -%}}"
        "{%- set previous = namespace(role='start') -%}"
        "{%- for message in messages -%}"
        "{%- set key = previous.role ~ '>' ~ message.role -%}"
        "{%- if key not in between -%}"
        "{{- raise_exception('no ' ~ message.role ~ ' after ' ~ previous.role) -}}"
        "{%- endif -%}"
        "{{- between[key] + message.content -}}"
        "{%- set previous.role = message.role -%}"
        "{%- endfor -%}"
        "{{- between[previous.role ~ ('>assistant' if add_generation_prompt else '>end')] -}}"
    )


def _probe_between(tokenizer, own: str, roles: list[str], generate: bool, between: dict[str, str]) -> None:
    """Enter the texts between turns of one rendering of `own` into `between`; those of the generation prompt win."""
    try:
        text = _render(tokenizer, own, tuple(map(Slot, roles)), generate)
    except DataError:
        return
    marks = list(MARK.finditer(text))
    if [int(mark[2]) for mark in marks] != list(range(len(roles))):
        return
    edges = ["start", *roles]
    position = 0
    for n, mark in enumerate(marks):
        between.setdefault(f"{edges[n]}>{roles[n]}", text[position : mark.start()])
        position = mark.end()
    tail = text[position:]
    if not generate:
        between.setdefault(f"{roles[-1]}>end", tail)
    elif roles[-1] != "assistant":
        # A prompt that leaves its think block open (DeepSeek's) is closed: the replies in the table have no reasoning.
        still_open = tail.rstrip().endswith("<think>")
        between[f"{roles[-1]}>assistant"] = tail.rstrip() + "\n\n</think>\n\n" if still_open else tail
