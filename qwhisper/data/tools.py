"""Tools that an assistant may call, and its calls: reads several forms and keeps one.

OpenAI's `tools` and `tool_calls`, the same without the wrapper `function`, their JSON text (ms-swift), and the blocks
`<tool_call>{…}</tool_call>` that Qwen's models write.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from qwhisper.data.clips import quoted
from qwhisper.data.keys import unknown_keys
from qwhisper.data.records import parse_json

CALL_KEYS = ("id", "type", "function", "index", "name", "arguments")
# Characters that chat templates write between quotes without escaping.
NAME = re.compile(r"[^\s\"\\<>{}]{1,200}")
CALL_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>\s*", re.DOTALL)
CALL_MARKS = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class ToolCall:
    """A call by an assistant. arguments: the text of a JSON object, in the chat templates' form."""

    name: str
    arguments: str

    @property
    def record(self) -> dict[str, Any]:
        """The call in OpenAI's form, with its arguments as an object, which chat templates write as JSON."""
        return {"type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}}


def parse_tools(raw: object, faults: list[str]) -> tuple[str, ...]:
    """The JSON text of each tool in OpenAI's form. raw: a list of schemas, or its JSON text."""
    example = "write a list of {'type': 'function', 'function': {'name': …, 'parameters': …}}"
    tools = _from_text(raw, "`tools`", faults)
    if tools is None:
        return ()
    if not isinstance(tools, list):
        faults.append(f"`tools` must be a list, not {type(tools).__name__}; {example}")
        return ()
    found = []
    for number, item in enumerate(tools, 1):
        tool = _from_text(item, f"tool {number}", faults)
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            faults.append(f"tool {number} has no `name`; {example}")
            continue
        whole = tool if "function" in tool else {"type": "function", "function": tool}
        found.append(_as_text(whole, f"tool {number}", faults))
    return tuple(found)


def parse_tool_calls(raw: object, where: str, faults: list[str]) -> tuple[ToolCall, ...]:
    """The calls of a message. raw: one call or a list of them, or their JSON text."""
    calls = _from_text(raw, f"{where}: `tool_calls`", faults)
    if calls is None:
        return ()
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        faults.append(f"{where}: `tool_calls` must be a list, not {type(calls).__name__}")
        return ()
    found = [_parse_call(call, f"{where}, tool call {number}", faults) for number, call in enumerate(calls, 1)]
    return tuple(call for call in found if call)


def split_calls(text: str, where: str, faults: list[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """An answer's text, and the calls after it in `<tool_call>` blocks."""
    if not any(mark in text for mark in CALL_MARKS):
        return text, ()
    said, _, behind = text.partition("<tool_call>")
    blocks = f"<tool_call>{behind}"
    if CALL_BLOCK.sub("", blocks) or any(mark in said for mark in CALL_MARKS):
        faults.append(
            f"{where}: the text holds {' or '.join(CALL_MARKS)} outside of blocks of JSON at its end; give the calls "
            "as `tool_calls`"
        )
        return text, ()
    calls: tuple[ToolCall, ...] = ()
    for block in CALL_BLOCK.findall(blocks):
        calls += parse_tool_calls(block.strip(), where, faults)
    return said.rstrip(), calls


def _parse_call(raw: object, where: str, faults: list[str]) -> ToolCall | None:
    call = raw.get("function", raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(call, dict):
        faults.append(f"{where} is not an object with `name` and `arguments`")
        return None
    wrong, unused = unknown_keys(raw, CALL_KEYS, where)
    if call is not raw:
        more = unknown_keys(call, ("name", "arguments"), where)
        wrong, unused = wrong + more[0], unused + more[1]
    faults += wrong + [f"{where}: unknown key `{key}`; a call has `name` and `arguments`" for key in unused]
    name, arguments = call.get("name"), _from_text(call.get("arguments"), f"{where}: `arguments`", faults)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        faults.append(f"{where}: `name` must be the name of a tool, not {quoted.repr(name)}")
        return None
    if arguments is not None and not isinstance(arguments, dict):
        faults.append(f"{where}: `arguments` must be an object, not {type(arguments).__name__}")
        return None
    return ToolCall(name, _as_text(arguments or {}, where, faults))


def _from_text(raw: object, what: str, faults: list[str]) -> Any:
    """The value of a JSON text; None for a blank text; anything but a text is returned unchanged."""
    if not isinstance(raw, str):
        return raw
    try:
        return parse_json(raw.strip()) if raw.strip() else None
    except (ValueError, RecursionError) as error:
        faults.append(f"{what} is not valid JSON ({error})")
        return None


def _as_text(value: dict, where: str, faults: list[str]) -> str:
    """JSON as the templates' `tojson` writes it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except UnicodeEncodeError:  # from JSON text within JSON, which the reader of lines does not check
        faults.append(f"{where} holds half of a surrogate pair, which is no character: fix the text")
        return "{}"
    except ValueError:
        faults.append(f"{where} holds NaN or Infinity, which JSON does not have")
        return "{}"
