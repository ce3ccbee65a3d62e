"""Write files durably: flush, write a text file whole, remove; and hash files.

To read files from another source use `files.py`, which also refuses pipes before anything is hashed.
"""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

WRITING = ".writing"  # end of the hidden name under which a file or folder is written


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file. After a failure it holds all of `text` or its old content."""
    aside = path.with_name(f".{path.name}{WRITING}")
    try:
        aside.write_text(text, encoding="utf-8")
        flush(aside)
    except OSError:
        remove(aside)
        raise
    aside.replace(path)
    flush(path.parent)


def remove(path: Path) -> None:
    """Delete a file, folder or link, as far as the disk allows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
