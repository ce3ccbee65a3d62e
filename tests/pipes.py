"""Pipes as the readers of a run's output leave them."""

import contextlib
import os


def full_pipe() -> tuple[int, int]:
    """(reading, writing) end of a pipe that takes no byte more."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"." * 4096)
    os.set_blocking(writing, True)
    return reading, writing


def read_all(descriptor: int) -> bytes:
    """What comes until every writing end is closed."""
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
