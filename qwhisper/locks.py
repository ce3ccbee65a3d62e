"""Locks on files, so that two processes never write to the same place."""

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwhisper.errors import UsageError

LOCK_FILE = ".lock"  # of a run folder


def hold(
    descriptor: int,
    lock: Callable[[int, int], None],
    path: Path,
    *,
    name: str,
    place: str,
    writer: str,
    another: str,
) -> None:
    """Lock the open file at `path` until it is closed or the process ends in any way; the kernel holds the lock.

    lock: `fcntl.lockf`, which forked processes don't inherit, but which ends when this process closes the file
    anywhere; or `fcntl.flock`, which is the reverse. name, place: the locked thing, for an error and for a note. Raises
    UsageError if another process has the lock, or had it and removed the file before this call; nothing is changed
    then. If the file system has no locks, print a note.
    """
    taken = UsageError(
        f"{name}: another {writer} writes into it. Wait until it is done, or give another {another}; nothing was "
        "changed"
    )
    try:
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise taken from None
        print(f"note: {place} can't be locked ({error}): let no second {writer} write into it", file=sys.stderr)
    if not _is_at(path, descriptor):
        raise taken


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _is_utf8(folder: Path) -> bool:
    try:
        os.fsencode(folder).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process; make the folder if it is missing.

    At the end a folder into which nothing else was written is left as it was found: without the lock file, and without
    the folders made here. The kernel holds the lock and drops it when the process ends in any way. Not `flock`, which
    child processes would inherit. Raises UsageError if another process has the lock, or if no run can be saved in the
    folder; nothing is changed then.
    """
    if not _is_utf8(folder):
        raise UsageError(
            f"--output_dir {str(folder)!a}: the name is not UTF-8, and a tokenizer can't be saved under it: give "
            "another folder"
        )
    with ExitStack() as at_end:
        try:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            at_end.callback(_remove_empty, missing)
            folder.mkdir(parents=True, exist_ok=True)
            found = set(os.listdir(folder))
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"--output_dir {folder}: nothing can be written there ({error}); give another folder"
            ) from None
        at_end.callback(os.close, descriptor)
        hold(
            descriptor,
            fcntl.lockf,
            folder / LOCK_FILE,
            name=f"--output_dir {folder}",
            place=str(folder),
            writer="trainer",
            another="folder",
        )
        at_end.callback(_remove_lock_alone, folder, found)
        yield


def _remove_lock_alone(folder: Path, found: set[str]) -> None:
    """Remove the lock file if nothing else is new in the folder since `found`. The caller must still hold the lock.

    Another process that has opened the file meanwhile finds out that it was removed.
    """
    with suppress(OSError):
        if set(os.listdir(folder)) - found == {LOCK_FILE}:
            (folder / LOCK_FILE).unlink()


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove each folder that is empty. folders: the innermost first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
