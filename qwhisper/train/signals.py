"""SIGINT, SIGTERM and SIGHUP while training: noted when they come, and asked for where nothing is half done.

A signal never raises by itself. Every wait asks at least once a second, an evaluation between its packs. A step that
takes long is given up between two of its packs, so that the checkpoint comes within 30 s.
"""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from qwhisper.engine.executor import Executor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 10.0  # for the step that a signal comes in; the pack in hand and the save have what is left of 30
T = TypeVar("T")


class Stopped(BaseException):
    """No Exception, as KeyboardInterrupt is none: no `except Exception` that it passes may take it for a fault."""


class StopSignals:
    """From `with` to its end, a signal ends the training after the step that it comes in, or before that step if packs
    are left when the grace is over; a second one changes nothing.

    received: the first one's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._last_quiet = time.monotonic()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # nohup has SIGHUP ignored: the run is meant to outlive its terminal.
        heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self.receive) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def poll(self) -> None:
        """To be called in every wait, and between packs that may be left at once. Raises Stopped if a signal came."""
        if self.received is not None:
            raise Stopped

    def between_packs(self) -> None:
        """To be called before each pack of a step. Raises Stopped where a signal came and the grace is over.

        That begins with the last call before the signal: Python hears of one only after the call into torch that it
        came in, and a backward pass is one call.
        """
        now = time.monotonic()
        if self.received is None:
            self._last_quiet = now
        elif now - self._last_quiet >= GRACE_SECONDS:
            raise Stopped

    def unless_stopped(self, executor: Executor, work: Callable[[], T]) -> T | None:
        """What `work` returns, or None if a signal came before or meanwhile: the executor polls before each pack.

        For what may take long, such as an evaluation, and may be left between two packs without harm.
        """
        before_pack, executor.before_pack = executor.before_pack, self.poll
        try:
            self.poll()
            return work()
        except Stopped:
            return None
        finally:
            executor.before_pack = before_pack
