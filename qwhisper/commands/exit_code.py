"""The end of a command: its exit code, and one line on stderr for a user's error."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from qwhisper.errors import QwhisperError
from qwhisper.report.streams import unfailing_output

INTERRUPTED = 130  # the shell's 128 + SIGINT


def exit_code_of(work: Callable[[], int | None], *, waits_for_reader: bool = True) -> int:
    """Run `work` and return its exit code. A QwhisperError and Ctrl-C end with one line; any other exception passes.

    waits_for_reader: False drops the line if nobody reads it in time.
    """
    try:
        return work() or 0
    except QwhisperError as error:
        code, line = error.exit_code, f"error: {error}"
    except KeyboardInterrupt:
        code, line = INTERRUPTED, "interrupted"
    with unfailing_output(on_lost=None if waits_for_reader else lambda lines: None):
        print(f"qwhisper: {line}", file=sys.stderr)
    return code


def end_process(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code; with INTERRUPTED after a Ctrl-C that `main` lets through.

    A Ctrl-C after `main` is ignored: while Python ends, the signal would kill the process.
    """
    try:
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = INTERRUPTED
    sys.exit(code)
