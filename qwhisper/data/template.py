"""Chat templates that can listen, and the pieces that a dialogue is rendered into.

The template that is trained on is the one that is served: rendered up to any assistant turn, with its generation
prompt, it gives a prefix of the whole dialogue. Qwen3's own does not: its empty think block
stands in the last turn alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qwhisper.data.conversation import AudioClip, Message
from qwhisper.data.try_template import cost_fault
from qwhisper.errors import DataError, UsageError

AUDIO_TOKEN = "<|audio_pad|>"

# Flattens lists of content parts to text, which most templates of text models crash on, and strips it.
PREAMBLE = (
    "{%- set flat = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- set flat.text = message.content if message.content is string else '' -%}"
    "{%- for part in ([] if message.content is string else message.content) -%}"
    f"{{%- set flat.text = flat.text ~ ('{AUDIO_TOKEN}' if part.type == 'audio' else part.text) -%}}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text | trim)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# Qwen3's two conditions: which turns have a think block. Patched: all have, and the history's reasoning is dropped.
QWEN3_HISTORY = "{%- if loop.index0 > ns.last_query_index %}"
QWEN3_EVERY_TURN = (
    "{%- if loop.index0 <= ns.last_query_index %}{%- set reasoning_content = '' %}{%- endif %}{%- if true %}"
)
QWEN3_LAST_TURN = "{%- if loop.last or (not loop.last and reasoning_content) %}"
# For a model that never saw a chat; line breaks around the contents, because contents are tokenised apart.
PLAIN = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}"
    "{%- elif message.role == 'user' -%}{{- 'User:\\n' + message.content + '\\n' -}}"
    "{%- else -%}{{- 'Assistant:\\n' + message.content + eos_token + '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)
# Role patterns (first letters) that a template is tried on.
PROBES = ("ua", "uaua", "uauaua", "suaua")
ROLE_OF = {"s": "system", "u": "user", "a": "assistant"}
# Marks that stand for the contents while a template is rendered, so that no content is ever read as template text.
MARK = re.compile("\ue000([cr])(\\d+)\ue001")


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered dialogue.

    kind: "scaffold" (the template's own text), "text" or "audio" (from the messages). message_index: the message whose
    content it is; None for scaffold, except for what the assistant writes itself (think marks), which is its turn's.
    """

    kind: str
    text: str
    message_index: int | None = None
    clip: AudioClip | None = None


def listening_template(tokenizer) -> tuple[str, str]:
    """(chat template to train with and to save with the processor, where it comes from in one line).

    The tokenizer's own template where it is prefix-stable, else Qwen3's patched, else a table of the texts that the
    own one writes between turns; a plain one where the tokenizer has none. Raises UsageError where nothing works.
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
    """Raises UsageError for a template that takes too long, too much memory or writes too much."""
    if (fault := cost_fault(chat_template)) is not None:
        raise UsageError(f"the chat template can't be used: {fault}")


def template_fault(tokenizer, chat_template: str) -> str | None:
    """Why a template can't be trained with, or None: tried on one to three turns, with and without a system message."""
    for probe in PROBES:
        roles = [ROLE_OF[letter] for letter in probe]
        try:
            _render(tokenizer, chat_template, tuple((role, False) for role in roles), False)
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
    messages: Sequence[Message], tokenizer, chat_template: str, add_generation_prompt: bool = False
) -> list[Piece]:
    """A dialogue as scaffold, texts and clips in their order; contents are stripped.

    The pieces before the first one of an assistant turn are exactly those of the generation prompt at that turn.
    Raises DataError where the template refuses the dialogue, drops a message or is not prefix-stable.
    """
    pattern = tuple((message.role, message.reasoning is not None) for message in messages)
    pieces = []
    for kind, text, index in _segments(tokenizer, chat_template, pattern, add_generation_prompt):
        if kind == "scaffold":
            pieces.append(Piece("scaffold", text, index))
        elif kind == "r":
            pieces.append(Piece("text", messages[index].reasoning or "", index))
        else:
            pieces += _content_pieces(messages[index].content, index)
    return pieces


def supports_reasoning(tokenizer, chat_template: str) -> bool:
    """Whether the template has a place for `reasoning_content`."""
    segments = _segments(tokenizer, chat_template, (("user", False), ("assistant", True)), False)
    return any(kind == "r" for kind, _, _ in segments)


def end_of_turn_ids(tokenizer, chat_template: str) -> list[int]:
    """Tokens that end an answer in generation: the one that closes an assistant turn, then the tokenizer's eos.

    Raises UsageError where no added token closes the turn: a model could never learn to stop.
    """
    last = _segments(tokenizer, chat_template, (("user", False), ("assistant", False)), False)[-1]
    added = added_token_ids(tokenizer)
    ends = [i for i in tokenizer(last[1], add_special_tokens=False)["input_ids"] if i in added][:1]
    if last[0] != "scaffold" or not ends:
        raise UsageError("no special token ends an assistant turn in this chat template: let it write eos_token there")
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def added_token_ids(tokenizer) -> set[int]:
    """Ids of all tokens that are matched as a whole, special or not (`<|im_end|>`, `<think>`)."""
    return set(tokenizer.added_tokens_decoder)


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of what a person or the model wrote: no special or other added token can come out of it.

    `split_special_tokens` leaves `<think>` and `<tool_call>` whole, since they are added but not special; so the text
    is cut inside each of them. Added tokens of white space alone (Gemma's runs of line breaks) are ordinary text.
    """
    inside = [match.start() + 1 for match in _forbidden(tokenizer, len(tokenizer)).finditer(text)]
    ids: list[int] = []
    for start, end in zip([0, *inside], [*inside, len(text)], strict=True):
        ids += tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@lru_cache(maxsize=16)
def _forbidden(tokenizer, num_tokens: int) -> re.Pattern:
    """Finds the added tokens in a text; `num_tokens` in the key notices tokens that were added since."""
    contents = [content for content in tokenizer.get_added_vocab() if content.strip() and len(content) > 1]
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


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


Pattern = tuple[tuple[str, bool], ...]  # (role, has reasoning) of each message: all that a rendering depends on


@lru_cache(maxsize=4096)
def _segments(tokenizer, chat_template: str, pattern: Pattern, add_generation_prompt: bool) -> tuple:
    """(kind, text, message index) of a rendering: kind "scaffold", "c" (a message's content) or "r" (its reasoning).

    Scaffold is cut where a generation prompt ends, so that what follows it is tokenised as the model will meet it.
    """
    text = _render(tokenizer, chat_template, pattern, add_generation_prompt)
    marks = list(MARK.finditer(text))
    contents = [int(mark[2]) for mark in marks if mark[1] == "c"]
    if contents != list(range(len(pattern))):
        raise DataError(f"the chat template drops, repeats or moves messages: of {len(pattern)} it renders {contents}")
    prompt_ends = {}
    for index, (role, _) in enumerate(pattern):
        if role != "assistant" or index == 0:
            continue
        thinking = any(mark[1] == "r" and int(mark[2]) == index for mark in marks)
        prompt = _render(tokenizer, chat_template, pattern[:index], True, thinking)
        if not text.startswith(prompt):
            raise DataError(f"the chat template is not prefix-stable: message {index + 1} does not follow its prompt")
        prompt_ends[len(prompt)] = index
    return tuple(_split(text, marks, prompt_ends))


def _split(text: str, marks: list[re.Match], prompt_ends: dict[int, int]):
    """Cut a rendering at its marks and at the ends of the generation prompts."""
    position, own_turn = 0, None
    for mark in [*marks, None]:
        end = mark.start() if mark else len(text)
        for cut in sorted(cut for cut in prompt_ends if position <= cut <= end):
            if cut > position:
                yield "scaffold", text[position:cut], own_turn
            position, own_turn = cut, prompt_ends[cut]
        if end > position:
            yield "scaffold", text[position:end], own_turn
        if mark:
            yield mark[1], "", int(mark[2])
            own_turn = own_turn if mark[1] == "r" else None
            position = mark.end()


def _render(
    tokenizer, chat_template: str, pattern: Pattern, add_generation_prompt: bool, thinking: bool = False
) -> str:
    messages = []
    for index, (role, has_reasoning) in enumerate(pattern):
        message = {"role": role, "content": f"\ue000c{index}\ue001"}
        if has_reasoning:
            message["reasoning_content"] = f"\ue000r{index}\ue001"
        messages.append(message)
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=thinking,
        )
    except Exception as error:  # a template is a program, and fails as programs do
        if isinstance(error, MemoryError):
            raise
        roles = ", ".join(role for role, _ in pattern)
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
        text = _render(tokenizer, own, tuple((role, False) for role in roles), generate)
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
