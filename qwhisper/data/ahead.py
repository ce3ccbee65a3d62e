"""A generator that runs in a thread, one item ahead of the thread that takes the items."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from qwhisper.data.processes import Poll
from qwhisper.data.worker import POLL_SECONDS

Item = TypeVar("Item")
END_SECONDS = 5.0  # for the thread; one that hangs on a dead disk by then is left alone


class _Left(BaseException):
    """Raised in the thread once nobody takes the items any more."""


@contextmanager
def one_ahead(items: Callable[[Poll], Generator[Item]], poll: Poll) -> Iterator[Iterator[Item]]:
    """A context that gives the items of `items(its_poll)`, in order. A thread makes the next item meanwhile, and the
    first one from the beginning of the context on; the end of the context closes the generator and ends the thread.

    items: must call `its_poll` at least once a second in its waits, and may not swallow what it raises. poll: is called
    that often in the waits of this thread; what it raises ends the wait. What the generator raises is raised here,
    after the items before it.
    """
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    turns, left = threading.Semaphore(1), threading.Event()

    def its_poll() -> None:
        if left.is_set():
            raise _Left

    def run() -> None:
        try:
            with closing(items(its_poll)) as source:
                while turns.acquire() and not left.is_set():
                    made.put((next(source), None))
        except BaseException as error:
            made.put((None, error))

    def taken() -> Iterator[Item]:
        while True:
            item, error = _next(made, poll)
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            turns.release()
            yield item

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # a limit of processes, which counts threads
        with closing(items(poll)) as made_here:
            yield made_here
        return
    try:
        yield taken()
    finally:
        left.set()
        turns.release()
        thread.join(END_SECONDS)


def _next(made: "queue.SimpleQueue[tuple[Any, BaseException | None]]", poll: Poll) -> tuple[Any, BaseException | None]:
    while True:
        poll()
        try:
            return made.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
