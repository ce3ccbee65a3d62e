"""stdout and stderr of a run, which goes on where they take nothing more.

The disk under them is full, the reader of their pipe is gone, their terminal was closed, or they were from the
beginning. What is told there is in the run folder's logs anyway. The command line waits for what is imported here.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast


class Unfailing:
    """A stream whose first failing write is told once on stderr; it and all after it go nowhere."""

    def __init__(self, stream: TextIO, name: str):
        self._stream = stream
        self._name = name
        self._is_told = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        # With what is left in its buffer: the interpreter's last flush would fail on that and end in exit code 120.
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        if not self._is_told:
            self._is_told = True
            print(
                f"{self._name} can't be written ({error}): the run goes on without; metrics.jsonl and events.jsonl "
                "have what it tells",
                file=sys.stderr,
            )


@contextmanager
def unfailing_output() -> Iterator[None]:
    """While it lasts, no write to stdout or stderr raises OSError, whoever prints; a closed one takes it all."""
    with ExitStack() as opened:
        # Opened for a closed one, it has that one's descriptor as well, which a library may write to.
        out, err = (
            Unfailing(stream or opened.enter_context(open(os.devnull, "w")), name)
            for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr"))
        )
        with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
            try:
                yield
            finally:
                out.flush()
                err.flush()
