"""SIGINT, SIGTERM and SIGHUP during training: recorded when they come, and polled where the run can stop.

Every wait polls at least once a second, an evaluation between its packs. A long step is aborted between two of its
packs, so that the checkpoint is saved within 30 s. The handler raises only while a pack is compiled, which takes up to
a minute.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from qwhisper.engine.executor import Executor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 10.0  # to finish the step; the rest of the 30 is for the current pack and the save
T = TypeVar("T")


class Stopped(BaseException):
    """A BaseException, like KeyboardInterrupt, so that no `except Exception` catches it as a fault."""


class StopSignals:
    """A context in which a signal ends the training after the current step; if packs of it are left after
    GRACE_SECONDS, the step is aborted. A second signal changes nothing.

    received: number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._last_quiet = time.monotonic()
        self._raises = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Under nohup SIGHUP is ignored: the run is meant to outlive its terminal.
        heeded = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self.receive) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The shell's 128 + the number of the signal; 0 if none came."""
        return 128 + self.received if self.received else 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._raises:
            self._raises = False
            raise Stopped

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A context in which a signal raises Stopped at once, for work that neither polls nor waits for other ranks."""
        self.poll()
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def poll(self) -> None:
        """Call in every wait, and between packs if the work may stop at once. Raises Stopped if a signal came."""
        if self.received is not None:
            raise Stopped

    def between_packs(self) -> None:
        """Call before each pack of a step. Raises Stopped if a signal came and GRACE_SECONDS are over.

        They count from the last call before the signal: Python runs the handler only after the current call into
        torch returns, and a backward pass is one call.
        """
        now = time.monotonic()
        if self.received is None:
            self._last_quiet = now
        elif now - self._last_quiet >= GRACE_SECONDS:
            raise Stopped

    def unless_stopped(self, executor: Executor, work: Callable[[], T]) -> T | None:
        """Do `work` and return its result, or None if a signal came before or during it.

        The executor polls before each pack. For long work that can stop between two packs, such as an evaluation.
        """
        before_pack, executor.before_pack = executor.before_pack, self.poll
        try:
            self.poll()
            return work()
        except Stopped:
            return None
        finally:
            executor.before_pack = before_pack
