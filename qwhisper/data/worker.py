"""A worker process: its main loop, and the messages that it and its parent exchange over a socket.

A worker is a fresh interpreter that imports this module. It is not forked, since in a fork the locks of other threads
stay locked; and `multiprocessing` doesn't start it, which would import the user's script again. This module and what it
imports load neither torch nor transformers: eight workers with Qwen3's tokenizer start in 1.4 s on 16 cores [measured].

The first message is the work, a callable; each further one is a task, which is answered with a pair: the result, and
the exception that was raised instead. A message is a pickle and, behind it, the memory of its large arrays: they are
sent from where they are and received where they stay, without a copy on either side.
"""

import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

ENTRY = "import sys; sys.path[:] = sys.argv[2:]; from qwhisper.data.worker import main; main(int(sys.argv[1]))"
POLL_SECONDS = 0.5  # between two polls in a wait
LENGTH = struct.Struct("!Q")
LARGE = 2**14  # bytes of an array that is sent apart from the pickle
# Each process has its share of the work; a pool of threads in each costs time and memory and computes nothing.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# Ctrl-C and a closed terminal signal all processes of a run; the trainer decides.
LEFT_TO_THE_TRAINER = (signal.SIGINT, signal.SIGHUP)


def command(descriptor: int) -> list[str]:
    """The command that starts a worker on an inherited socket. Its modules are found where this process finds them."""
    # An empty entry is the current folder, as in a notebook and where a script is read from stdin.
    places = [os.path.abspath(place) for place in sys.path if isinstance(place, str)]
    return [sys.executable, "-c", ENTRY, str(descriptor), *places]


def to_message(value: Any) -> list[bytes | memoryview]:
    """The parts of a message: the pickle, and the memory of large arrays in it."""
    apart: list[memoryview] = []

    def stays_in_pickle(buffer: pickle.PickleBuffer) -> bool:
        memory = buffer.raw()
        if memory.nbytes >= LARGE:
            apart.append(memory)
        return memory.nbytes < LARGE

    pickled = pickle.dumps(value, pickle.HIGHEST_PROTOCOL, buffer_callback=stays_in_pickle)
    return [pickled, *apart]


def from_message(parts: Sequence[bytearray]) -> Any:
    """The value; its large arrays lie in the memory of the parts."""
    return pickle.loads(parts[0], buffers=parts[1:])


def send(channel: socket.socket, parts: Sequence[bytes | memoryview]) -> None:
    """Send the number of parts, the length of each, and the parts."""
    channel.sendall(b"".join(map(LENGTH.pack, (len(parts), *(len(part) for part in parts)))))
    for part in parts:
        channel.sendall(part)


def receive(channel: socket.socket, poll: Callable[[], None] | None = None) -> list[bytearray]:
    """The parts of the next message. `poll` is called every POLL_SECONDS of a wait, also in the middle of a message;
    what it raises ends the wait. Raises EOFError if the other process has closed its end.
    """
    (count,) = LENGTH.unpack(_read(channel, LENGTH.size, poll))
    lengths = LENGTH.iter_unpack(_read(channel, count * LENGTH.size, poll))
    return [_read(channel, length, poll) for (length,) in lengths]


def _read(channel: socket.socket, size: int, poll: Callable[[], None] | None) -> bytearray:
    arrivals = select.poll()
    arrivals.register(channel, select.POLLIN)
    data = bytearray(size)
    left = memoryview(data)
    while left:
        while poll is not None and not arrivals.poll(1000 * POLL_SECONDS):
            poll()
        count = channel.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return data


def main(descriptor: int) -> None:
    """Work until the parent process ends, and with it the other end of the socket."""
    for number in LEFT_TO_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_TRAINER)  # blocked until here by the parent
    with socket.socket(fileno=descriptor) as channel, suppress(EOFError, OSError):
        work: Callable[[Any], Any] | None = None
        while True:
            message = receive(channel)
            try:
                if work is None:
                    work = from_message(message)
                    continue
                answer = to_message((work(from_message(message)), None))
            except Exception as error:
                answer = to_message((None, _portable(error)))
            send(channel, answer)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note; the note alone if the error can't be pickled."""
    trace = f"in a data worker:\n{traceback.format_exc()}"
    error.add_note(trace)
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(trace)
