"""A file that one process holds at a time: two writers of one place would write over each other's work."""

import errno
import fcntl
import sys
from collections.abc import Callable

from qwhisper.errors import UsageError


def hold(
    descriptor: int, lock: Callable[[int, int], None], *, name: str, place: str, writer: str, another: str
) -> None:
    """Takes an open file until it is closed, or the process ends, however that ends; the lock is the kernel's.

    lock: `fcntl.lockf`, which forked processes don't hold on to, but which any other closing of the file in this
    process ends; or `fcntl.flock`, the other way round. name, place: what is held, for an error and for a note. Raises
    UsageError where another process has it; nothing is changed then. Where no file can be locked, it says so.
    """
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(
                f"{name}: another {writer} writes into it. Wait until it is done, or give another {another}; nothing "
                "was changed"
            ) from None
        print(f"note: {place} can't be locked ({error}): let no second {writer} write into it", file=sys.stderr)
