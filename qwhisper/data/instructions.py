"""Instructions for speech that has none: a shipped pool in English and Chinese, or the user's own file."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwhisper.data.clips import KNOWN_KEYS, SOURCES
from qwhisper.data.dialogue import KNOWN
from qwhisper.data.files import file_fault
from qwhisper.data.keys import IN_PART, unknown_keys
from qwhisper.errors import UsageError

POOLS = Path(__file__).parent / "instructions"
LANGUAGES = ("en", "zh")
NOTHING = '""'  # a pool's line for no instruction: the model just reacts to what is said


def instruction_pool(language: str = "both") -> list[str]:
    """The pool of one of LANGUAGES, or of "both"; each language includes the empty instruction."""
    chosen = LANGUAGES if language == "both" else (language,)
    return list(dict.fromkeys(line for name in chosen for line in read_instructions(POOLS / f"{name}.txt")))


def read_instructions(path: str | Path) -> list[str]:
    """One instruction a line, UTF-8; blank lines are ignored, and `""` is the empty instruction.

    Raises UsageError if there is no such file, or no instruction in it.
    """
    if fault := file_fault(path):
        raise UsageError(f"--instructions {path} {fault}: give a text file with one instruction a line")
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise UsageError(f"--instructions {path}: not UTF-8; save the file as UTF-8") from None
    if not any(lines):
        raise UsageError(f"--instructions {path}: no instruction in it; write one a line")
    return list(dict.fromkeys("" if line == NOTHING else line for line in lines if line))


def as_question(record: dict[str, Any], instructions: Sequence[str], seed: int) -> dict[str, Any]:
    """Convert a bare line, {"audio": path, "transcript": text} and perhaps id, kind and keys of an audio part, to the
    canonical form: one user's message of the audio and an instruction. Other keys stay in the record. Any other record
    is returned unchanged.

    Line content and seed alone decide the instruction: it does not depend on the line's position.
    """
    if "messages" in record or not any(name in record for name in SOURCES):
        return record
    drawn = random.Random(f"{seed} {json.dumps(record, sort_keys=True)}").choice(instructions)
    clip = {name: value for name, value in record.items() if _is_about_the_clip(name)}
    content: list[dict[str, Any]] = [{"type": "audio", **clip}]
    content += [{"type": "text", "text": drawn}] if drawn else []
    others = {name: value for name, value in record.items() if name not in clip and name != "kind"}
    return {**others, "messages": [{"role": "user", "content": content, "kind": record.get("kind")}]}


def _is_about_the_clip(name: str) -> bool:
    """Whether a key belongs in the audio part: it is known there, or refused there as misspelled."""
    if name in (*KNOWN, "kind"):
        return False
    return name in KNOWN_KEYS or bool(unknown_keys({name: True}, KNOWN_KEYS, "", IN_PART)[0])
