"""The end of a command: its exit code, and one line on stderr for a user's error."""

import sys
from collections.abc import Callable

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
