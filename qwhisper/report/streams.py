"""Keeps failures and stalls of stdout and stderr from ending or blocking a run.

They fail on a full disk, a pipe without a reader or a closed terminal; they stall on a paused pipe or terminal or a
stalled log collector. The run folder's logs have the same content. Imports are few, because the command line loads
this file before anything else.
"""

import atexit
import json
import os
import select
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast

from qwhisper.report import relay
from qwhisper.report.relay import cannot_be_written

RELAY_ENDS_S = 4 * relay.PATIENCE_S
RELAY_IS_GONE = "note: the process that passes on the output was killed; from now on the run waits for its readers"


class Unfailing:
    """A stream that reports its first failing write on stderr, and discards that and all later output.

    terminal: descriptor of the stream's terminal, if the stream leads to the relay. without_relay: restores the
    stream's original target; None if the stream has it.
    """

    def __init__(self, stream: TextIO, name: str):
        self.terminal: int | None = None
        self.without_relay: Callable[[], None] | None = None
        self._stream = stream
        self.name = name
        self._has_warned = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self.terminal is not None or self._stream.isatty()

    def fileno(self) -> int:
        """The terminal's descriptor, if there is one: a progress bar reads the width from it."""
        return self._stream.fileno() if self.terminal is None else self.terminal

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
        if self.without_relay:  # the relay accepts all output, so a failed write means that it was killed
            self.without_relay()
            print(RELAY_IS_GONE, file=sys.stderr)
            self.flush()  # writes what is left in the buffer, if there is one
            return
        # Discards the buffer too: the interpreter's last flush would fail on it and end in exit code 120.
        with suppress(OSError):
            _discard(self._stream.fileno())
        if not self._has_warned:
            self._has_warned = True
            print(cannot_be_written(self.name, error), file=sys.stderr)


@contextmanager
def unfailing_output(*, on_lost: Callable[[int], None] | None = None) -> Iterator[None]:
    """A context in which no write to stdout or stderr raises OSError; a closed stream discards output.

    With on_lost, no write waits for a reader either. Lines that a reader does not read in time are dropped; when it
    continues, it gets a line with their number. on_lost is called at the end with the number of lost lines, if any.
    """
    with ExitStack() as opened:
        # A stream opened for a closed one also gets its descriptor, to which a library may write.
        out, err = (
            Unfailing(stream or opened.enter_context(open(os.devnull, "w")), name)
            for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr"))
        )
        if on_lost:
            opened.callback(_end, start_relay([out, err]), on_lost)
        with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
            try:
                yield
            finally:
                out.flush()
                err.flush()


@dataclass(frozen=True)
class Relayed:
    """Descriptors that lead to a relay process.

    targets: a copy of each descriptor's original target. descriptors: those of each outlet of the relay, by its name.
    """

    process: subprocess.Popen
    streams: Sequence[Unfailing]
    targets: dict[int, int]
    descriptors: dict[str, list[int]]

    def put_back(self) -> None:
        """Restore the targets of the descriptors."""
        for stream in self.streams:
            stream.terminal = stream.without_relay = None
        for descriptor, target in self.targets.items():
            os.dup2(target, descriptor)


def start_relay(streams: Sequence[Unfailing]) -> Relayed | None:
    """Put a relay process between the streams that may have to wait and their readers; see relay.py."""
    waiting = [stream for stream in streams if _may_wait(stream)]
    if not waiting or not sys.executable:
        return None
    targets = {stream.fileno(): os.dup(stream.fileno()) for stream in waiting}
    outlets: dict[tuple[int, int], str] = {}  # both streams of a terminal share one: their lines stay in order
    pipes: dict[str, tuple[int, int]] = {}
    descriptors: dict[str, list[int]] = {}
    for stream in waiting:
        status = os.fstat(stream.fileno())
        name = outlets.setdefault((status.st_dev, status.st_ino), stream.name)
        if name not in pipes:
            pipes[name] = os.pipe()
        descriptors.setdefault(name, []).append(stream.fileno())
    arguments = [f"{name}:{pipes[name][0]}:{targets[those[0]]}" for name, those in descriptors.items()]
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", relay.__file__, str(relay.PATIENCE_S), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            pass_fds=[int(number) for argument in arguments for number in argument.split(":")[1:]],
            start_new_session=True,  # Ctrl-C and Ctrl-Z in the terminal are meant for the run
        )  # fmt: skip
    except OSError:  # no memory, or a limit of processes: the run then waits for a reader that has stopped
        for descriptor in (*targets.values(), *(end for pipe in pipes.values() for end in pipe)):
            os.close(descriptor)
        return None
    for stream in waiting:
        stream.terminal = targets[stream.fileno()] if stream.isatty() else None
    for name, (reading, writing) in pipes.items():
        for descriptor in descriptors[name]:
            os.dup2(writing, descriptor)
        os.close(reading)
        os.close(writing)
    relayed = Relayed(process, waiting, targets, descriptors)
    for stream in waiting:
        stream.without_relay = relayed.put_back
    return relayed


def _may_wait(stream: Unfailing) -> bool:
    """Whether the stream is a pipe, a socket or a terminal with a reader."""
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):  # a Python object without a descriptor
        return False
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(descriptor)):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return not poll.poll(0)  # reports only errors


def _end(relayed: Relayed | None, on_lost: Callable[[int], None]) -> None:
    """Wait until the relay has passed everything on, or no reader reads."""
    if relayed is None:
        return
    relayed.put_back()
    for target in relayed.targets.values():
        os.close(target)
    try:
        # Not the end of its stdin: a child forked since may keep that open.
        answer, _ = relayed.process.communicate(b"end", timeout=RELAY_ENDS_S)
        report = json.loads(answer)
    except (subprocess.TimeoutExpired, ValueError):  # the relay hangs or was killed
        relayed.process.kill()
        relayed.process.wait()
        return
    for name in report["dead"]:
        for descriptor in relayed.descriptors[name]:
            _discard(descriptor)
    for name in report["stalled"]:
        atexit.register(_discard_what_would_wait, relayed.descriptors[name])
    if report["lost"]:
        on_lost(report["lost"])


def _discard_what_would_wait(descriptors: Sequence[int]) -> None:
    """Called at the interpreter's end, so that no last flush or line of a library blocks the process."""
    for descriptor in descriptors:
        if not select.select([], [descriptor], [], 0)[1]:
            _discard(descriptor)


def _discard(descriptor: int) -> None:
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
