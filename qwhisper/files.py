"""Read files from an untrusted source: nothing here waits for a pipe or fills the memory.

Errors are CheckpointError, or the type that a caller gives as `fault` (UsageError for a base model).
"""

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwhisper.errors import CheckpointError, QwhisperError

MIB = 1 << 20
MAX_JSON_BYTES = 16 * MIB  # configurations are kilobytes; the index of a sharded model reaches some megabytes
# By the end of the file name; the first match counts. The largest tokenizers in use (Gemma's) have 33 MB.
MAX_BYTES = (
    (("tokenizer.json", "vocab.json", ".model", "vocab.txt", "merges.txt"), 64 * MIB),
    ((".jinja",), MIB),
    ((".json",), MAX_JSON_BYTES),
)
# Kinds of files that a model, tokenizer or optimizer is loaded from.
LOADED_SUFFIXES = (
    ".safetensors", ".json", ".jinja", ".model", "vocab.txt", "merges.txt", ".bin", ".pt", ".pth", ".pkl",
)  # fmt: skip
MAX_FILES = 10_000  # a checkpoint has about 15
SPARSE_FROM_BYTES = 1 << 30
SPARSE_SHARE = 16  # a file with less than 1/16 of its bytes on the disk was not written by a save


def read_bytes(path: Path, max_bytes: int, fault: type[QwhisperError] = CheckpointError) -> bytes:
    """Content of a regular file. Raises `fault` for anything else, for a larger file and for one that can't be read."""
    try:
        # Opening a pipe without O_NONBLOCK waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as handle:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise fault(f"{path} is no regular file")
            if status.st_size > max_bytes:
                raise fault(f"{path} has {status.st_size} bytes, more than the {max_bytes} that such a file may have")
            return handle.read(max_bytes)
    except OSError as error:
        raise fault(f"{path}: can't be read ({error})") from error


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, fault: type[QwhisperError] = CheckpointError) -> Any:
    """A JSON file's value. Raises `fault` if it is not readable as JSON."""
    content = read_bytes(path, max_bytes, fault)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise fault(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from error


def read_json_object(path: Path, fault: type[QwhisperError] = CheckpointError) -> dict[str, Any]:
    """The same for a file that must hold an object."""
    value = read_json(path, fault=fault)
    if not isinstance(value, dict):
        raise fault(f"{path}: holds {type(value).__name__} where an object is expected")
    return value


def files_of(
    folder: Path, fault: type[QwhisperError] = CheckpointError, *, patterns: Sequence[str] = ()
) -> dict[str, Path]:
    """Regular files by their path in the folder, sorted, subfolders included; links to folders are not followed.
    patterns: look only at files of the folder itself whose names match one of them.

    Raises `fault` if a file that would be loaded is a pipe or device, too large for its kind, or sparse, or if there
    are more files than any save writes.
    """
    found = {}
    for entry in _entries(folder, fault, patterns):
        path = Path(entry.path)
        try:
            status = entry.stat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):  # a dangling link counts as missing
                continue
            raise fault(f"{path}: can't be read ({error})") from error
        if stat.S_ISREG(status.st_mode):
            _refuse_implausible_size(path, status, fault)
            found[path.relative_to(folder).as_posix()] = path
        elif not stat.S_ISDIR(status.st_mode) and entry.name.endswith(LOADED_SUFFIXES):
            raise fault(f"{path} is no regular file")
    return dict(sorted(found.items()))


def _entries(folder: Path, fault: type[QwhisperError], patterns: Sequence[str]) -> Iterator[os.DirEntry]:
    """All entries of a folder and its subfolders, without the subfolders themselves."""
    count, folders = 0, [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if patterns and not any(fnmatchcase(entry.name, pattern) for pattern in patterns):
                        continue
                    if (count := count + 1) > MAX_FILES:
                        raise fault(f"{folder} has more than {MAX_FILES} files: this is not a model's folder")
                    if not entry.is_dir(follow_symlinks=False):
                        yield entry
                    elif not patterns:
                        folders.append(Path(entry.path))
    except OSError as error:
        raise fault(f"{folder}: can't be read ({error})") from error


def _refuse_implausible_size(path: Path, status: os.stat_result, fault: type[QwhisperError]) -> None:
    limit = next((most for ends, most in MAX_BYTES if path.name.endswith(ends)), None)
    if limit is not None and status.st_size > limit:
        raise fault(f"{path} has {status.st_size} bytes, more than the {limit} that such a file may have")
    if status.st_size > SPARSE_FROM_BYTES and status.st_blocks * 512 * SPARSE_SHARE < status.st_size:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Some file systems don't count blocks; those report no hole either.
            holes = os.lseek(descriptor, 0, os.SEEK_HOLE) < status.st_size
        finally:
            os.close(descriptor)
        if holes:
            raise fault(f"{path} claims {status.st_size} bytes and holds {status.st_blocks * 512}: it is sparse")
