"""Work for worker processes, which find it by its module's name, and which of them are there.

Imports no more than a worker may.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from qwhisper.data import loader, worker
from qwhisper.data.encode import DialogueEncoder
from qwhisper.errors import DataError


def worker_pids() -> list[int]:
    """Of the workers that this process started."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _is_worker(path)]


def _is_worker(stat: Path) -> bool:
    try:
        parent = int(stat.read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"qwhisper.data.worker" in (stat.parent / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return False


def square(n: int) -> int:
    return n * n


def bytes_of(n: int) -> bytes:
    return bytes([n]) * 5_000_000


def length(data: bytes) -> int:
    return len(data)


def fails_at_3(n: int) -> int:
    if n == 3:
        raise DataError("line 3 is empty")
    return n


class Odd(Exception):
    """Can't be unpickled."""

    def __init__(self, one, two):
        super().__init__(one)


def fails_oddly(n: int) -> None:
    raise Odd("the reason", 2)


def signals_itself(number: int) -> int:
    if number:
        os.kill(os.getpid(), number)
    return number


def hangs_at_1(n: int) -> int:
    if n:
        signal.pause()
    return n


def exits(code: int) -> None:
    os._exit(code)


def stops_in_an_answer_at_1(n: int) -> bytes:
    """Half of its answer is never sent."""
    if n:

        def send(channel, parts):
            channel.sendall(worker.LENGTH.pack(1) + worker.LENGTH.pack(len(parts[0])) + parts[0][:1000])
            signal.pause()

        worker.send = send
    return bytes(100_000)


def read_and_look(reader: loader.DialogueReader, task) -> tuple[list[int], list[str]]:
    """A dialogue's ids, and which of some modules are imported here once it is read."""
    dialogue, names = task
    (rows,) = reader.read_all([dialogue])
    return rows[0].input_ids.tolist(), [name for name in names if name in sys.modules]


def settings(_: None) -> dict:
    return {"path": sys.path, "threads": threading.active_count(), "argv": sys.argv[:1]}


def careless_main(descriptor: int) -> None:
    """A worker that takes signals as any program does."""
    worker.signal.SIG_IGN = signal.SIG_DFL  # type: ignore[misc, assignment]
    worker.main(descriptor)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def signal_trainer(trainer: int, number: int) -> None:
    """Send the trainer a signal from this process or from a worker; not from a worker that outlives it, since another
    process may have its id by then.
    """
    if trainer in (os.getpid(), os.getppid()):
        os.kill(trainer, number)


@dataclass
class SignalsAndHangs:
    """Called, it sends a signal to the trainer and hangs; it never returns.

    A worker hangs until it is killed. A thread of the trainer hangs until `end`: a run that is stopped abandons it, and
    it would read on and signal whatever test runs by then. After `seconds` the reading fails, in case nobody leaves it.
    """

    trainer: int
    number: int
    seconds: float = 60.0
    ended: bool = False
    threads: dict[threading.Thread, threading.Event] = field(default_factory=dict)

    def __call__(self) -> NoReturn:
        released = self.threads[threading.current_thread()] = threading.Event()
        if not self.ended:  # asked after the entry in `threads`: `end` sees the entry, or this sees that it has ended
            signal_trainer(self.trainer, self.number)
            released.wait(self.seconds)
        raise RuntimeError("the read was to be left")

    def end(self) -> None:
        """Return when no thread of this process is left that could send the signal. A later call raises at once."""
        self.ended = True
        for thread, released in list(self.threads.items()):
            released.set()
            thread.join(self.seconds)
            assert not thread.is_alive(), "a thread that sends signals is left"


@dataclass
class Hangs:
    """Called, it waits so many seconds; `now` says whether a process is waiting."""

    noted: Path
    seconds: float

    def __call__(self) -> None:
        self.noted.write_text(str(os.getpid()))
        threading.Event().wait(self.seconds)
        self.noted.unlink()

    def now(self) -> bool:
        return self.noted.exists() and Path(f"/proc/{self.noted.read_text()}/cwd").exists()  # not of a zombie


@dataclass
class CrashingReader(loader.DialogueReader):
    """Reading one of `ids` does `how` to the process, unless that is the trainer."""

    ids: frozenset[str] = frozenset()
    how: Callable[[], None] = die
    trainer: int = 0

    def read(self, dialogue):
        if dialogue.id in self.ids and os.getpid() != self.trainer:
            self.how()
        return super().read(dialogue)


@dataclass
class NeverComes(loader.DialogueReader):
    """Reading the step after some sends SIGINT to the trainer once it waits for it, and takes so many seconds."""

    encoder: DialogueEncoder | None = None  # type: ignore[assignment]
    trainer: int = 0
    after_steps: int = 0
    waits: Path = Path()
    seconds: float = 0.0
    steps: int = 0

    def read_step(self, step):
        if self.steps == self.after_steps and os.getpid() != self.trainer:
            while not self.waits.exists() and os.getppid() == self.trainer:
                threading.Event().wait(0.01)
            signal_trainer(self.trainer, signal.SIGINT)
            threading.Event().wait(self.seconds)
        self.steps += 1
        return super().read_step(step)


class ExitingReader(loader.DialogueReader):
    """Ends the process that reads ahead, whatever it reads."""

    def read_step(self, step):
        os._exit(3)
