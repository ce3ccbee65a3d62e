"""The command line: which verbs there are, and what runs each. A handler is imported only when its verb runs.

A handler is `main(arguments) -> int | None`, its arguments a dataclass whose fields are the verb's flags. What a user
did wrong is a QwhisperError and ends with one message and its exit code; anything else is our bug: a traceback.
"""

import difflib
import importlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwhisper import __version__
from qwhisper.errors import QwhisperError, UsageError
from qwhisper.report.streams import unfailing_output

INTERRUPTED = 130  # the shell's 128 + SIGINT


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One line of the table: `handler` and `arguments` are "module:name", `positionals` the fields without a flag."""

    summary: str
    handler: str
    arguments: str
    positionals: tuple[str, ...] = ()
    example: str


VERBS = {
    "demo": Verb(
        summary="the whole path offline on this computer, with synthesised speech and small models",
        handler="qwhisper.demo.run:main",
        arguments="qwhisper.arguments:DemoArguments",
        example="qwhisper demo --output_dir demo-output",
    ),
    "data check": Verb(
        summary="validate dialogues and audio before a run",
        handler="qwhisper.data.check:main",
        arguments="qwhisper.arguments:DataCheckArguments",
        positionals=("file",),
        example="qwhisper data check data.jsonl --text_model Qwen/Qwen3-8B",
    ),
    "data answer": Verb(
        summary="have the text model answer transcripts: training data from audio and its words",
        handler="qwhisper.infer.answer:main",
        arguments="qwhisper.arguments:DataAnswerArguments",
        positionals=("in_file", "out_file"),
        example="qwhisper data answer in.jsonl out.jsonl --text_model Qwen/Qwen3-8B",
    ),
    "train": Verb(
        summary="fine-tune projector and LoRA; the stable recipe is the default",
        handler="qwhisper.train.run:main",
        arguments="qwhisper.train.arguments:TrainArguments",
        example="qwhisper train --train_file data.jsonl --output_dir run",
    ),
    "verify": Verb(
        summary="reload a checkpoint, run one step and one generation, prove that no number is NaN",
        handler="qwhisper.train.verification:main",
        arguments="qwhisper.arguments:VerifyArguments",
        positionals=("checkpoint",),
        example="qwhisper verify run/checkpoint-200",
    ),
    "eval": Verb(
        summary="exact match, WER/CER and loss, beside the same with swapped audio",
        handler="qwhisper.evaluate.evaluation:main",
        arguments="qwhisper.arguments:EvalArguments",
        positionals=("checkpoint",),
        example="qwhisper eval run --eval_file test.jsonl --output_json eval.json",
    ),
    "chat": Verb(
        summary="talk to a trained model: text and audio files, several turns",
        handler="qwhisper.infer.chat:main",
        arguments="qwhisper.arguments:ChatArguments",
        positionals=("checkpoint",),
        example="qwhisper chat run --audio question.wav",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where it is closed
            # An ASCII locale has no ×, and no Chinese name; a log or pipe should show each line when it is printed.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return _run(argv)
    except QwhisperError as error:
        code, told = error.exit_code, f"error: {error}"
    except KeyboardInterrupt:
        code, told = INTERRUPTED, "interrupted"
    # The end of a run waits for a reader no more than the run did.
    with unfailing_output(on_lost=(lambda lines: None) if argv[0] == "train" else None):
        print(f"qwhisper: {told}", file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
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

    from qwhisper.parsing import parse  # takes HfArgumentParser from transformers: about a second

    arguments = parse(name, verb, load(verb.arguments), rest)
    if arguments is None:  # --help
        return 0

    from qwhisper.versions import check_versions

    check_versions(quantized=getattr(arguments, "load_in_4bit", False))
    return load(verb.handler)(arguments) or 0


def load(reference: str) -> Any:
    """The object that "module:name" names."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def _split_verb(argv: list[str]) -> tuple[str, list[str]]:
    """The verb (one word or two) and what follows it; a group alone or with --help comes back as its one word."""
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in VERBS:
            return name, argv[length:]
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
