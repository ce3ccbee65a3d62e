"""Locks on files, so that two processes never write to the same place."""

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
    """Lock an open file until it is closed or the process ends in any way; the kernel holds the lock.

    lock: `fcntl.lockf`, which forked processes don't inherit, but which ends when this process closes the file
    anywhere; or `fcntl.flock`, which is the reverse. name, place: the locked thing, for an error and for a note. Raises
    UsageError if another process has the lock; nothing is changed then. If the file system has no locks, print a note.
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
    """Lock a run folder for this process; make the folder if it is missing.

    The kernel holds the lock and drops it when the process ends in any way. Not `flock`, which child processes would
    inherit. Raises UsageError if another process has the lock, or if no run can be saved in the folder; nothing is
    changed then.
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
