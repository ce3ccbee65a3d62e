"""Reading a checkpoint of a run that may be in training: a trainer deletes older ones meanwhile."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qwhisper.checkpoint.folders import ATTEMPTS, checkpoints, resolve_checkpoint
from qwhisper.errors import CheckpointError, QwhisperError

Read = TypeVar("Read")


def is_run_folder(name: str | os.PathLike) -> bool:
    """Whether this is a folder with checkpoints in it that is no model itself."""
    return (
        os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")) and bool(checkpoints(Path(name)))
    )


def read_checkpoint(path: str | os.PathLike, read: Callable[[Path], Read]) -> Read:
    """`read(folder)` for the checkpoint that `path` names, see `resolve_checkpoint`. The folder's path is absolute.

    What is returned was read from one whole checkpoint. If a trainer deletes it meanwhile, the best or newest one that
    the run has then is read, at most ATTEMPTS times. Raises CheckpointError if that is not enough, or if `path` names
    the deleted checkpoint itself; otherwise as `resolve_checkpoint` and `read` do.
    """
    # A relative path that is no longer there would be taken for the name of a repository on the hub.
    given = Path(os.path.abspath(path))
    existed = given.is_dir()
    for _ in range(ATTEMPTS):
        try:
            folder = resolve_checkpoint(given)
            identity = _identity(folder)
        except QwhisperError:
            if existed and not given.is_dir():
                raise _deleted(given) from None
            raise
        try:
            result = read(folder)
        except Exception:
            if identity is not None and identity == _identity(folder):
                raise
        else:
            if identity is not None and identity == _identity(folder):
                return result
        if not given.is_dir():
            raise _deleted(given)
    raise CheckpointError(
        f"{path}: each of {ATTEMPTS} checkpoints was deleted while it was read: let the trainer keep more of them "
        "(--save_total_limit), or copy one and give the copy"
    )


def _identity(folder: Path) -> tuple[int, int] | None:
    """Another one: the checkpoint was deleted, or replaced by one of the same step."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _deleted(checkpoint: Path) -> CheckpointError:
    others = checkpoints(checkpoint.parent)
    newest = f"; the newest of its run is {others[-1].name}" if others else ""
    return CheckpointError(
        f"{checkpoint}: it was deleted while it was read{newest}. Give the run's folder instead: {checkpoint.parent}"
    )
