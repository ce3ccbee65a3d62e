"""One trainer a run folder: two would write over each other's checkpoints and logs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwhisper.errors import UsageError
from qwhisper.file_lock import hold
from qwhisper.train.places import LOCK_FILE


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
