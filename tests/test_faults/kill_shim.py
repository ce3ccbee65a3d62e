"""A save that ends at its k-th write, fsync or rename: by SIGKILL in a forked child, or by an error of the disk.

Children are forked from one process that has imported, and perhaps built, everything: a kill costs milliseconds.
"""

import builtins
import contextlib
import io
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qwhisper.model import saving as model_saving
from qwhisper.train import session, state

CHANGING_CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir")  # of `os`; pathlib and shutil call them there


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Callable[[], None]:
    """Raises the OSError of an errno."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


class Operations:
    """Inside `with`, every operation under `folder` that changes the disk: `seen` names them in order.

    At the `at`-th, counted from 0, `act` is called: in the middle of a write, before any other.
    """

    def __init__(self, folder: Path, at: int | None = None, act: Callable[[], None] = kill):
        self.folder = str(folder.resolve())
        self.at = at
        self.act = act
        self.seen: list[str] = []
        self._patches = contextlib.ExitStack()
        self._open = io.open

    def __enter__(self) -> "Operations":
        for name in CHANGING_CALLS:
            self._patch(os, name, self._before(name, getattr(os, name)))
        self._patch(os, "fsync", self._fsync)
        self._patch(builtins, "open", self._opened)
        self._patch(io, "open", self._opened)
        for module in (state, session, model_saving, safetensors.torch):
            self._patch(module, "save_file", self._foreign(module.save_file))
        self._patch(torch, "save", self._foreign(torch.save))
        self._patch(
            PreTrainedTokenizerFast, "_save_pretrained", self._tokenizer(PreTrainedTokenizerFast._save_pretrained)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _patch(self, owner: object, name: str, value: object) -> None:
        self._patches.enter_context(mock.patch.object(owner, name, value))

    def hits(self, name: str, path: object) -> bool:
        """Counts an operation; whether it is the one."""
        if not str(path).startswith(self.folder):
            return False
        self.seen.append(f"{name} {os.path.relpath(path, self.folder)}")
        return len(self.seen) - 1 == self.at

    def _before(self, name: str, call: Callable) -> Callable:
        def changing(path, *args, dir_fd=None, **kwargs):
            where = path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
            if self.hits(name, where):
                self.act()
            return call(path, *args, **kwargs) if dir_fd is None else call(path, *args, dir_fd=dir_fd, **kwargs)

        return changing

    def _fsync(self, descriptor: int, call: Callable = os.fsync) -> None:
        if self.hits("fsync", os.readlink(f"/proc/self/fd/{descriptor}")):
            self.act()
        call(descriptor)

    def _opened(self, path, mode="r", *args, **kwargs):
        file = self._open(path, mode, *args, **kwargs)
        if not set(mode) & set("wax+") or not isinstance(path, str | os.PathLike):
            return file
        if self.hits("open", path):
            self.act()
        return _Written(file, path, self) if str(path).startswith(self.folder) else file

    def _foreign(self, call: Callable) -> Callable:
        def save(content, path, *args, **kwargs):
            call(content, path, *args, **kwargs)
            self._after_foreign_write(path)

        return save

    def _tokenizer(self, call: Callable) -> Callable:
        def save(*args, **kwargs):
            written = call(*args, **kwargs)
            self._after_foreign_write(written[-1])
            return written

        return save

    def _after_foreign_write(self, path) -> None:
        """By a library that does not write in Python. Half of its file is there when it is hit."""
        if self.hits("write", path):
            with self._open(path, "rb") as file:
                content = file.read()
            os.truncate(path, len(content) // 2)
            self.act()
            with self._open(path, "wb") as file:
                file.write(content)


class Copies(Operations):
    """Copies the folder at every operation: what a kill there would leave, since all that it takes is the process's."""

    def __init__(self, folder: Path, target: Path):
        super().__init__(folder, act=lambda: shutil.copytree(folder, target / str(len(self.seen) - 1)))

    def hits(self, name: str, path: object) -> bool:
        count = len(self.seen)
        super().hits(name, path)
        return len(self.seen) > count


class _Written:
    """A file opened for writing; a hit comes when half of a write is done."""

    def __init__(self, file, path, operations: Operations):
        self._file, self._path, self._operations = file, path, operations

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def write(self, data):
        if self._operations.hits("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._operations.act()
            data = data[len(data) // 2 :]
        return self._file.write(data)


def in_child(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """How a forked process that does `work` ended: 0; 1 where it raised; minus the signal that killed it.

    kill_after: seconds after which it is killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the other threads were not forked
            # tqdm's own lock is one for all forks: who is killed with it in hand would hold up all that come after.
            tqdm.set_lock(threading.RLock())
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if kill_after is not None:
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def operations_of(
    work: Callable[[], object], folder: Path, watched: Callable[[Path], Operations] = Operations
) -> list[str]:
    """The names of the operations that `work` does under `folder`, watched in a child."""
    reading, writing = os.pipe()

    def counted() -> None:
        with watched(folder) as operations:
            work()
        os.write(writing, "\n".join(operations.seen).encode())

    assert in_child(counted) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return pipe.read().splitlines()


def killed_everywhere(work: Callable[[], object], folder: Path) -> Iterator[str]:
    """Lets a child do `work`, and makes of `folder` in turn what a kill at each operation under it would have left.

    Yields the operation's name each time.
    """
    copies = folder.with_name(f"copies-of-{folder.name}")
    for number, name in enumerate(operations_of(work, folder, lambda folder: Copies(folder, copies))):
        shutil.rmtree(folder)
        (copies / str(number)).rename(folder)
        yield name
