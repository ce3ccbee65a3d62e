"""Worker processes, on the side of the process that gives them work: tasks in order, read ahead; deaths are noticed.

torch's DataLoader is not used: it raises the death of a worker at any point of the training process, even inside an
optimizer step or a save; and without its signal handler a worker killed in the middle of a message blocks the reader
for ever. Here each worker has its own socket, which no other process can write to: when it closes, the worker is dead.
"""

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import cycle, islice
from typing import Any, TypeVar

from qwhisper.data import worker
from qwhisper.data.light_tokenizer import dumps

AHEAD = 2  # tasks given to a worker: the current one and the next
# Time limit of an answer. Decoding takes seconds: a worker that is silent for this long hangs, in a decoder or on a
# network drive.
ANSWER_SECONDS = 900.0
STOP_SECONDS = 1.0  # a killed process that still exists by then hangs in the kernel, on a dead disk: left alone
ENDING_WAITS = 30  # of STOP_SECONDS, for a process that has closed its socket
Task = TypeVar("Task")
Result = TypeVar("Result")
Poll = Callable[[], None]  # called at least once a second in every wait; what it raises ends the wait


class WorkerDied(Exception):
    """A worker ended before it answered, hangs, or could not be started.

    how: "signal 9", "exit code 1", "no answer in 900 s", "no process could be started (…)" or the same of a thread.
    """

    def __init__(self, how: str):
        super().__init__(how)
        self.how = how


def nothing() -> None:
    """A poll that never ends a wait."""


def work_ahead(
    work: Callable[[Task], Result], tasks: Iterator[Task], num_workers: int, poll: Poll = nothing
) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result, `work(task)`, in the order of the tasks; without workers in this process.

    work: picklable, and importable by its module's name. Raises WorkerDied, and whatever `work` and `poll` raise.
    """
    if not num_workers:
        for task in tasks:
            yield task, work_in_thread(work, task, poll)
        return
    workers: list[Worker] = []
    try:
        pickled = dumps(work)
        for _ in range(num_workers):
            workers.append(Worker(pickled))
        given: deque[tuple[Task, Worker]] = deque()
        for each, task in zip(cycle(workers), islice(tasks, AHEAD * num_workers), strict=False):
            each.give(task)
            given.append((task, each))
        while given:
            task, each = given.popleft()
            poll()  # also if every answer is there before it is waited for
            result = each.answer(poll)
            for following in islice(tasks, 1):
                each.give(following)
                given.append((following, each))
            yield task, result
    finally:
        stop(workers)


def work_in_thread(work: Callable[[Task], Result], task: Task, poll: Poll) -> Result:
    """Run `work(task)` in another thread while this one polls. If a poll raises, work that hangs is abandoned."""
    if poll is nothing:
        return work(task)
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(task), None))
        except BaseException as error:
            done.put((None, error))

    _start_thread(run)
    while True:
        poll()
        with suppress(queue.Empty):
            result, error = done.get(timeout=worker.POLL_SECONDS)
            break
    if error is not None:
        raise error
    return result


def how_it_dies(work: Callable[[Task], Any], task: Task, poll: Poll = nothing) -> str | None:
    """Run `work(task)` in a throwaway process. Return how it died or hung; None if it finished (even by raising) or
    could not start.
    """
    try:
        throwaway = Worker(dumps(work))
    except WorkerDied:
        return None
    try:
        throwaway.give(task)
        throwaway.answer(poll)
    except WorkerDied as death:
        return death.how
    except Exception:
        return None
    finally:
        stop([throwaway])
    return None


class Worker:
    """One process. A thread writes its tasks, so that sending a large one does not block the caller."""

    def __init__(self, pickled_work: bytes):
        self._messages: queue.SimpleQueue[Sequence[bytes | memoryview] | None] = queue.SimpleQueue()
        self._messages.put([pickled_work])
        try:
            self.channel, its_end = socket.socketpair()
            with its_end, ExitStack() as failed:
                failed.enter_context(self.channel)
                self.process = _start(its_end.fileno())
                failed.pop_all()
        except OSError as error:  # no memory, or a limit of processes or open files
            raise WorkerDied(f"no process could be started ({error.strerror})") from None
        try:
            _start_thread(self._send_all)
        except WorkerDied:
            self.kill()
            self.wait()
            raise

    def give(self, task: Any) -> None:
        """Queue a task; never blocks."""
        self._messages.put(worker.to_message(task))

    def answer(self, poll: Poll = nothing) -> Any:
        """The oldest result that was not taken yet. Raises WorkerDied, and what the work and `poll` raise."""
        deadline = time.monotonic() + ANSWER_SECONDS

        def waited() -> None:
            poll()
            if time.monotonic() >= deadline:
                raise WorkerDied(f"no answer in {ANSWER_SECONDS:.0f} s")

        try:
            message = worker.receive(self.channel, waited)
        except (EOFError, OSError):
            raise WorkerDied(self._how_it_ended(poll)) from None
        result, error = worker.from_message(message)
        if error is not None:
            raise error
        return result

    def _how_it_ended(self, poll: Poll) -> str:
        """How the process ended once its socket closed. One that uses much memory takes a while to end."""
        for _ in range(ENDING_WAITS):
            with suppress(subprocess.TimeoutExpired):
                code = self.process.wait(STOP_SECONDS)
                return f"signal {-code}" if code < 0 else f"exit code {code}"
            poll()
        return "it closed its socket"

    def _send_all(self) -> None:
        with suppress(OSError):  # dead: noticed when its answer is read
            while (message := self._messages.get()) is not None:
                worker.send(self.channel, message)

    def kill(self) -> None:
        """Kill the process, without waiting for its end."""
        self.process.kill()  # it holds nothing that could be left half done, and may hang in a decoder
        self._messages.put(None)
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)  # ends a write of the thread

    def wait(self) -> None:
        """Wait up to STOP_SECONDS for the end of a killed process."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self.channel.close()


def stop(workers: Sequence[Worker]) -> None:
    """Kill all workers, then wait for their ends."""
    for each in workers:
        each.kill()
    for each in workers:
        each.wait()


def _start_thread(target: Callable[[], None]) -> None:
    try:
        threading.Thread(target=target, daemon=True).start()
    except RuntimeError as error:  # a limit of processes, which counts threads
        raise WorkerDied(f"no thread could be started ({error})") from None


def _start(descriptor: int) -> subprocess.Popen:
    """Start a worker on its end of a socket. Signals for the trainer stay blocked until the worker ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, worker.LEFT_TO_THE_TRAINER)
    try:
        return subprocess.Popen(
            worker.command(descriptor),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[descriptor],
            env=os.environ | worker.ONE_THREAD,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
