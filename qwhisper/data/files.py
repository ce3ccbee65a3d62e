"""Opens a file once, so that the checked file is the one that is read. Nothing here is about audio.

A checked path may lead to another file a moment later: anyone who can write to a folder can put a link there. So a file
is opened once, the descriptor is checked, and everything is read from that descriptor.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qwhisper.errors import BadClipError

READ = (
    os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
)  # not blocking: a FIFO put there after the check must not wait for a writer
BLOCK = 2**16

Piece = bytes | tuple[int, int]  # bytes themselves, or (start, end) offsets of the file


def file_fault(path: str | Path) -> str | None:
    """Why `path` can't be read as a file, or None. Nothing is opened: a FIFO would wait for its writer."""
    try:
        return kind_fault(os.stat(path).st_mode)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"can't be reached ({error.strerror})"


@contextmanager
def opened(source: str | Path | bytes, *, follow_links: bool = True) -> Iterator[int]:
    """A descriptor of a file, or of bytes that are a whole file; closed at the end.

    follow_links: False refuses a path with a link anywhere in it: for a path that was resolved when it was checked.
    Raises BadClipError if it is no regular file, OSError if it can't be read at this moment.
    """
    descriptor = _in_memory(source) if isinstance(source, bytes) else _open_file(source, follow_links)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("sound", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _open_file(path: str | Path, follow_links: bool) -> int:
    if fault := file_fault(path):
        raise BadClipError(f"{path} {fault}; leave it out")
    descriptor = os.open(path, READ) if follow_links else open_without_links(path)
    if fault := kind_fault(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadClipError(f"{path} {fault}; leave it out")
    return descriptor


def open_without_links(path: str | Path) -> int:
    """Open folder by folder, each within the one before: no link can lead out, whenever it is put there."""
    *folders, name = Path(os.path.abspath(path)).parts
    folder = os.open(folders[0], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders[1:]:
            inner = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        return os.open(name, READ | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise BadClipError(
            f"{path}: a link appeared in this path after it was checked (it leads to {os.path.realpath(path)} now), "
            "and is not followed; load the data again"
        ) from None
    finally:
        os.close(folder)


def kind_fault(mode: int) -> str | None:
    """What a file of this mode is instead of a regular file, as the end of a sentence, or None. mode: `st_mode`."""
    if stat.S_ISREG(mode):
        return None
    kinds = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return f"is {next((kind for kind, matches in kinds.items() if matches(mode)), 'a device')}, not a file"


class FileBytes:
    """Bytes of a descriptor by offset, read in blocks; its position does not change."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._start, self._block = 0, b""

    def get(self, start: int, count: int) -> bytes:
        """Up to `count` bytes from `start`; fewer at the end."""
        at = start - self._start
        if at < 0 or at + count > len(self._block):
            self._start, at = start, 0
            self._block = os.pread(self.descriptor, max(count, BLOCK), start)
        return self._block[at : at + count]

    def find(self, what: bytes, start: int, stop: int) -> int:
        """The offset of `what`, or -1."""
        while start < stop:
            block = self.get(start, min(BLOCK, stop - start))
            if (at := block.find(what)) >= 0:
                return start + at
            if len(block) < BLOCK:
                return -1
            start += len(block) - len(what) + 1
        return -1

    def only_zeros(self, start: int, stop: int) -> bool:
        return all(not any(self.get(at, min(BLOCK, stop - at))) for at in range(start, stop, BLOCK))


class Pieces(io.RawIOBase):
    """Pieces of a file end to end, as one file."""

    def __init__(self, descriptor: int, pieces: Sequence[Piece]):
        super().__init__()
        self._descriptor = descriptor
        self._pieces = [(piece, len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]) for piece in pieces]
        self._size = sum(length for _, length in self._pieces)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        filled, begin = 0, 0
        for piece, length in self._pieces:
            at = self._position - begin
            if 0 <= at < length and filled < len(buffer):
                count = min(length - at, len(buffer) - filled)
                if isinstance(piece, bytes):
                    content = piece[at : at + count]
                else:
                    content = os.pread(self._descriptor, count, piece[0] + at)
                buffer[filled : filled + len(content)] = content
                filled += len(content)
                self._position += len(content)
                if len(content) < count:  # the file was shortened in the meantime
                    break
            begin += length
        return filled
