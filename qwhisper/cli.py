"""The command line: finds the verb, parses its flags, runs its command, and turns the result into an exit code.

A user's error is a QwhisperError and ends with one message and its exit code; any other exception is a bug and ends
with a traceback.
"""

import difflib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from qwhisper import __version__
from qwhisper.commands import VERBS, Verb
from qwhisper.commands.exit_code import end_process, exit_code_of
from qwhisper.errors import UsageError
from qwhisper.parsing import parse


def entry_point(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line as a process, which ends with its exit code."""
    end_process(lambda: main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            # An ASCII locale has no ×, and no Chinese name; a log or pipe should show each line when it is printed.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    verb = VERBS.get(" ".join(argv[: _verb_length(argv)]))
    return exit_code_of(lambda: _run(argv), waits_for_reader=verb is None or verb.waits_for_reader)


def _run(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview(VERBS))
        return 0
    if argv[0] == "--version":
        print(f"qwhisper {__version__}")
        return 0
    name, rest = _split_verb(argv)
    if name not in VERBS:  # a group such as `data`
        print(_overview({key: verb for key, verb in VERBS.items() if key.startswith(name + " ")}))
        return 0
    verb = VERBS[name]
    arguments = parse(name, verb, load(verb.arguments), rest)
    if arguments is None:  # --help
        return 0

    from qwhisper.versions import check_versions  # importlib.metadata is slow to import

    check_versions(quantized=verb.loads_models and getattr(arguments, "load_in_4bit", False))
    return load(verb.command)(arguments)


def load(reference: str) -> Any:
    """The object with the name "module:name"."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def _verb_length(argv: list[str]) -> int:
    """Number of words of the verb at the beginning of the command line; 0 if there is none."""
    return next((length for length in (2, 1) if " ".join(argv[:length]) in VERBS), 0)


def _split_verb(argv: list[str]) -> tuple[str, list[str]]:
    """The verb (one word or two) and the rest; a group without a verb, or with --help, is returned as one word."""
    if length := _verb_length(argv):
        return " ".join(argv[:length]), argv[length:]
    group = [name for name in VERBS if name.startswith(argv[0] + " ")]
    if group and argv[1:2] in ([], ["-h"], ["--help"]):
        return argv[0], argv[1:]
    wanted = " ".join(argv[:2]) if group else argv[0]
    nearest = difflib.get_close_matches(wanted, group or VERBS, n=1)
    hint = f"did you mean `qwhisper {nearest[0]}`?" if nearest else f"verbs: {', '.join(VERBS)}"
    raise UsageError(f"no such command: qwhisper {wanted}; {hint}")


def _overview(verbs: dict[str, Verb]) -> str:
    width = max(len(name) for name in verbs)
    lines = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in verbs.items())
    examples = "\n".join(f"  {verb.example}" for verb in verbs.values())
    return f"""qwhisper {__version__}: teach a text model to listen

usage: qwhisper VERB [--flag value ...]

{lines}

examples:
{examples}

qwhisper VERB --help   all flags of a verb, with the reason for each default
qwhisper --version     the version"""
