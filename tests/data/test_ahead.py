"""A generator that runs one item ahead gives what it would give alone, and leaves no thread."""

import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace

import pytest

from qwhisper.data.ahead import one_ahead
from qwhisper.data.processes import nothing
from qwhisper.errors import DataError

LONG = 60.0  # seconds; a test that works waits for no time


@pytest.fixture(autouse=True)
def no_thread_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Stopped(BaseException):
    pass


def counted(count: int, error: Exception | None = None) -> SimpleNamespace:
    """items: yields 0, 1, …, `count` - 1, and raises `error`. made: a semaphore with one turn for each item."""
    found = SimpleNamespace(made=threading.Semaphore(0), closed=threading.Event(), threads=set(), most=0)

    def items(poll: Callable[[], None]) -> Generator[int]:
        try:
            for n in range(count):
                found.threads.add(threading.current_thread())
                found.most = n
                found.made.release()
                yield n
            if error is not None:
                raise error
        finally:
            found.closed.set()

    found.items = items
    return found


def test_the_items_come_in_order_from_another_thread():
    source = counted(50)
    with one_ahead(source.items, nothing) as items:
        assert list(items) == list(range(50))
    assert threading.current_thread() not in source.threads and source.closed.is_set()


def test_the_first_item_is_made_before_it_is_asked_for_and_then_one_more_than_taken():
    source = counted(10)
    with one_ahead(source.items, nothing) as items:
        assert source.made.acquire(timeout=LONG) and source.most == 0
        for n in range(3):
            assert next(items) == n
            assert source.made.acquire(timeout=LONG) and source.most == n + 1


def test_an_error_comes_after_the_items_before_it():
    source = counted(2, DataError("line 3 is empty"))
    with one_ahead(source.items, nothing) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(DataError, match="line 3 is empty"):
            next(items)
    assert source.closed.is_set()


def test_leaving_early_closes_the_generator():
    source = counted(10)
    with one_ahead(source.items, nothing) as items:
        assert next(items) == 0
    assert source.closed.is_set() and source.most < 3


def test_a_poll_that_raises_ends_the_wait_and_that_of_the_generator():
    waiting, closed = threading.Event(), threading.Event()

    def items(poll: Callable[[], None]) -> Generator[int]:
        try:
            while True:
                waiting.set()
                poll()
            yield 0
        finally:
            closed.set()

    def poll() -> None:
        if waiting.is_set():
            raise Stopped

    with pytest.raises(Stopped), one_ahead(items, poll) as made:
        next(made)
    assert closed.is_set()


def test_without_a_thread_the_items_are_made_when_they_are_asked_for(monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    source, polls = counted(3), []
    with one_ahead(source.items, lambda: polls.append(None)) as items:
        assert next(items) == 0 and source.most == 0
    assert source.threads == {threading.current_thread()} and source.closed.is_set()
