"""Reads the JSON objects of a JSONL file, one a line, each with its place or its fault."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwhisper.data.clips import quoted

MAX_LINE_BYTES = 2**24  # 16 MiB of text in one dialogue; a file without line breaks could be one endless line
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class DuplicateKeyError(ValueError):
    """A JSON object has one key twice: one of the two values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(f"the key {quoted.repr(twice)} appears twice in one object; keep one")
    return found


# One decoder for all lines: `json.loads` with a hook builds one for each line, which takes twice the time.
parse_json = json.JSONDecoder(object_pairs_hook=_object).decode


def read_records(path: Path) -> Iterator[tuple[str, dict | str]]:
    """(source, record) of each line that is not blank; for a line that is no JSON object, its fault instead."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            source = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                yield source, f"longer than {MAX_LINE_BYTES} bytes; each line should be one dialogue"
                while line and not line.endswith(b"\n"):
                    line = file.readline(2**16)
                continue
            record = parse_line(line, "utf-8-sig" if number == 1 else "utf-8")
            if record is not None:
                yield source, record


def parse_line(line: bytes, encoding: str) -> dict | str | None:
    """The object in a line, or its fault; None for a blank line."""
    try:
        text = line.decode(encoding).strip()
        record = parse_json(text) if text else None
        if SURROGATE_ESCAPE.search(text):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair, \\u{ord(error.object[error.start]):x}, which is no character: fix the text"
    except RecursionError:
        return "not valid JSON (nested too deeply)"
    except DuplicateKeyError as error:
        return str(error)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text[error.pos] == "{":
            # `cat` makes such a line from two files if the first does not end with a line break.
            return f"two objects on one line: a line break is probably missing before character {error.pos + 1}"
        return f"not valid JSON ({error})"
    return record if isinstance(record, dict) or not text else "not a JSON object with `messages`"
