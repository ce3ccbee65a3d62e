"""One trainer a run folder: two would write over each other's checkpoints and logs."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwhisper.errors import UsageError

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made where it is missing, for this process.

    The lock is the kernel's and dies with the process, however that ends. It is no `flock`, which the data workers that
    are forked later would hold on to. Raises UsageError where another process has it; nothing is changed then.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"--output_dir {folder}: nothing can be written there ({error}); give another folder"
        ) from None
    try:
        _acquire(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, folder: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UsageError(
                f"--output_dir {folder}: another trainer writes into it. Wait until it is done, or give another "
                "folder; nothing was changed"
            ) from None
        print(f"note: {folder} can't be locked ({error}): let no second trainer write into it", file=sys.stderr)
