"""The process between a run and the readers of its output: it accepts everything at once and passes it on when it can.

streams.py starts it as a script, so it imports only the standard library. It is a process and not a thread of the run,
so that it also receives what a library writes to the descriptor, and the last lines before a crash.

    python relay.py PATIENCE NAME:IN:OUT …      a word on stdin, or its end, marks the end of the run; stdout: JSON

PATIENCE: seconds, see Outlet.finish. NAME: for messages. IN, OUT: descriptors to read from and to write to.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

MAX_BYTES = 2**20  # kept for a reader that has stopped; above this, the oldest lines are dropped
PATIENCE_S = 2.0  # wait after the end of the run: for a reader that reads nothing, and for the last output


def cannot_be_written(name: str, error: OSError) -> str:
    return (
        f"{name} can't be written ({error}): the run continues without it; metrics.jsonl and events.jsonl are complete"
    )


class Outlet:
    """A queue of lines and the thread that writes them to a descriptor, however long each write takes.

    on_error is called from that thread with the error that ended the writing; the queue then discards everything.
    """

    def __init__(self, name: str, descriptor: int, on_error: Callable[[str], None]):
        self.name = name
        self._descriptor = descriptor
        self._on_error = on_error
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._gap = 0  # lines dropped since the last written one
        self._lost = 0  # before that
        self._last_byte = b"\n"
        self.in_hand = b""  # being written; may be the beginning of a line
        self.is_dead = False
        self._is_idle = True
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def lost(self) -> int:
        """Number of lines dropped or not yet written, the current one included."""
        left = sum(line.endswith(b"\n") for line in (*self._lines, self.in_hand))
        return self._lost + self._gap + left

    def put(self, data: bytes) -> None:
        """Queue data without a wait."""
        with self._changed:
            if self.is_dead:
                return
            for line in data.splitlines(keepends=True):  # bytes: at \n, and at \r, which begins a progress bar's text
                if self._lines and not self._lines[-1].endswith((b"\n", b"\r")):
                    self._lines[-1] += line
                else:
                    self._lines.append(line)
            self._size += len(data)
            while self._size > MAX_BYTES:
                oldest = self._lines.popleft()
                self._size -= len(oldest)
                self._gap += oldest.endswith(b"\n")
            self._changed.notify_all()

    def finish(self, patience_s: float) -> bool:
        """Wait until everything is written. Returns False if nothing was written for `patience_s`."""
        with self._changed:
            while self._lines or not self._is_idle:
                if not self._changed.wait(patience_s):  # each write notifies
                    return False
        return True

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._is_idle, self.in_hand = not self._lines, b""
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._lines)
                    self._is_idle = False
                    line = self.in_hand = self._lines.popleft()
                    self._size -= len(line)
                    gap, self._gap = self._gap, 0
                    self._lost += gap
                self._write(self._note(gap) + line if gap else line)
        except OSError as error:
            self._on_error(cannot_be_written(self.name, error))
            with self._changed:
                self._is_idle = self.is_dead = True
                self.in_hand = b""
                self._lines.clear()
                self._changed.notify_all()

    def _note(self, gap: int) -> bytes:
        start = "" if self._last_byte in b"\r\n" else "\n"
        lines = f"{gap} lines of output were" if gap > 1 else "1 line of output was"
        return f"{start}note: {lines} dropped here, because nobody read them; metrics.jsonl has every step\n".encode()

    def _write(self, data: bytes) -> None:
        while data:
            select.select([], [self._descriptor], [])  # another program may have set it to O_NONBLOCK
            with suppress(BlockingIOError):
                count = os.write(self._descriptor, data[: select.PIPE_BUF])
                self._last_byte, data = data[count - 1 : count], data[count:]
                with self._changed:
                    self._changed.notify_all()


def main(arguments: Sequence[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal sends them to all processes of the run
        signal.signal(number, signal.SIG_IGN)
    outlets: dict[int, Outlet] = {}

    def tell(message: str) -> None:
        for outlet in outlets.values():
            outlet.put(message.encode() + b"\n")

    patience_s = float(arguments[0])
    for argument in arguments[1:]:
        name, source, target = argument.split(":")
        outlets[int(source)] = Outlet(name, int(target), tell)
    _pass_on(outlets)
    stalled: set[Outlet] = set()
    for _ in range(2):  # an error of the second outlet may still be written to the first
        stalled |= {outlet for outlet in outlets.values() if outlet not in stalled and not outlet.finish(patience_s)}
    lost = sum(outlet.lost for outlet in outlets.values())
    dead = [outlet.name for outlet in outlets.values() if outlet.is_dead]
    print(json.dumps({"lost": lost, "stalled": [outlet.name for outlet in stalled], "dead": dead}), flush=True)
    os._exit(0)  # don't wait for a write that does not end


def _pass_on(outlets: dict[int, Outlet]) -> None:
    """Return when the run has ended and all its output was accepted."""
    poll = select.poll()
    for descriptor in (sys.stdin.fileno(), *outlets):
        poll.register(descriptor, select.POLLIN)
    left, deadline = set(outlets), None
    while left and (deadline is None or time.monotonic() < deadline):
        events = poll.poll(None if deadline is None else 0)
        if deadline is not None and not events:
            return
        for descriptor, _ in events:
            if descriptor == sys.stdin.fileno():
                deadline = time.monotonic() + PATIENCE_S
                poll.unregister(descriptor)
            elif data := os.read(descriptor, 2**16):
                outlets[descriptor].put(data)
            else:
                left.discard(descriptor)
                poll.unregister(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])
