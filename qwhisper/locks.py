"""Files that one process holds at a time: two writers of one place would write over each other's work."""

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwhisper.errors import UsageError

LOCK_FILE = ".lock"  # of a run folder


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


def _is_utf8(folder: Path) -> bool:
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made where it is missing, for this process.

    The lock is the kernel's and dies with the process, however that ends. It is no `flock`, which the data workers that
    are forked later would hold on to. Raises UsageError where another process has it, or where no run could be saved in
    such a folder; nothing is changed then.
    """
    if not _is_utf8(folder):
        raise UsageError(
            f"--output_dir {str(folder)!a}: the name is not UTF-8, and a tokenizer can't be saved under it: give "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"--output_dir {folder}: nothing can be written there ({error}); give another folder"
        ) from None
    try:
        hold(
            descriptor,
            fcntl.lockf,
            name=f"--output_dir {folder}",
            place=str(folder),
            writer="trainer",
            another="folder",
        )
        yield
    finally:
        os.close(descriptor)
