"""Choose and read a checkpoint of a run, while a trainer may save and delete others."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from qwhisper.checkpoint.facts import best_checkpoint
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.manifest import check_usable
from qwhisper.checkpoint.names import ADAPTER_CONFIG, MANIFEST, MODEL_CONFIG, PREFIX, PROJECTOR_FILE, STATE_FILE
from qwhisper.errors import CheckpointError, QwhisperError, UsageError
from qwhisper.files import files_of, read_json_object

Read = TypeVar("Read")
ATTEMPTS = 5  # to read a run whose checkpoints a trainer renames and deletes at the same time


def _seen(run_folder: Path) -> set[tuple[str, int]]:
    """Name and inode of each checkpoint: if they differ later, a trainer has saved or deleted one."""
    seen = set()
    for folder in run_folder.glob(f"*{PREFIX}*"):
        with suppress(OSError):
            seen.add((folder.name, folder.stat().st_ino))
    return seen


def newest_usable(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole and finite, or None; and the fault of each newer one.

    If a trainer saves or deletes checkpoints at the same time, look again, at most ATTEMPTS times.
    """
    for _ in range(ATTEMPTS):
        before = _seen(run_folder)
        newest, passed_over = _newest_usable(run_folder)
        if (newest and not passed_over) or _seen(run_folder) == before:
            break
    return newest, passed_over


def _newest_usable(run_folder: Path) -> tuple[Path | None, list[str]]:
    passed_over: list[str] = []
    for folder in reversed(checkpoints(run_folder)):
        try:
            check_usable(folder)
            return folder, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def choose_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint at `path`; in a run folder, the best by evaluation, else the newest usable one.

    Raises UsageError if there is no checkpoint, CheckpointError if all are damaged or not finite. A trainer
    may save and delete checkpoints of the run at the same time.
    """
    folder = Path(path)
    for _ in range(ATTEMPTS):
        before = _seen(folder)
        try:
            return _choose(folder)
        except (QwhisperError, OSError) as error:
            failed = error
        if _seen(folder) == before:
            break
    if isinstance(failed, OSError):
        raise CheckpointError(f"{path}: it can't be read ({failed})") from failed
    raise failed


def _choose(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; {_instead(folder)}")
    if os.path.lexists(folder / MANIFEST):
        check_usable(folder)
        return folder
    by_a_run = folder.name.startswith(PREFIX) and os.path.lexists(folder / STATE_FILE)
    if _holds_model(folder) and not by_a_run:  # saved by `save_pretrained`, without a run around it
        files_of(folder)
        return folder
    found = checkpoints(folder)
    if not found:
        if folder.name.startswith(PREFIX):
            raise CheckpointError(f"{folder}: {MANIFEST} is missing, so its files can't be verified")
        if (folder / ADAPTER_CONFIG).is_file():
            raise UsageError(
                f"{folder}: a PEFT adapter alone; load its model, then PeftModel.from_pretrained(model, ...)"
            )
        raise UsageError(f"{folder}: neither a checkpoint nor a run folder with {PREFIX}N folders in it")
    if not any(os.path.lexists(each / file) for each in found for file in (MANIFEST, STATE_FILE)):
        raise UsageError(f"{folder}: not a run of `qwhisper train`; give one of its checkpoints, such as {found[-1]}")
    newest, passed_over = newest_usable(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint can be used: {'; '.join(passed_over)}")
    best = best_checkpoint(newest)
    if best and best != newest.name and (folder / best).is_dir():
        check_usable(folder / best)
        return folder / best
    return newest


def _instead(missing: Path) -> str:
    """What a user can give instead of a folder that does not exist."""
    others = checkpoints(missing.parent) if missing.name.startswith(PREFIX) else []
    if others:
        return f"the newest checkpoint of {missing.parent} is {others[-1].name}"
    return f"give a run folder or one of its {PREFIX}N folders"


def _holds_model(folder: Path) -> bool:
    """Whether the folder has trained weights or a whole model of ours."""
    if (folder / PROJECTOR_FILE).is_file():
        return True
    try:
        return read_json_object(folder / MODEL_CONFIG).get("model_type") == "qwen3_audio"
    except CheckpointError:
        return False


def read_checkpoint(path: str | os.PathLike, read: Callable[[Path], Read]) -> Read:
    """`read(folder)` for the checkpoint that `path` names, see `choose_checkpoint`. The folder's path is absolute.

    The result comes from one whole checkpoint. If a trainer deletes it during the reading, read the best or newest one
    that the run has then, at most ATTEMPTS times. Raises CheckpointError if that is not enough, or if `path` names the
    deleted checkpoint itself; otherwise as `choose_checkpoint` and `read` do.
    """
    # A relative path that no longer exists would be read as the name of a repository on the hub.
    given = Path(os.path.abspath(path))
    existed = given.is_dir()
    for _ in range(ATTEMPTS):
        try:
            folder = choose_checkpoint(given)
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


def read_run(path: str | os.PathLike, read: Callable[[str | os.PathLike], Read]) -> Read:
    """`read(folder)` for the checkpoint of one of our runs, see `read_checkpoint`; for anything else `read(path)`."""
    return read_checkpoint(path, read) if _is_run(path) else read(path)


def _is_run(name: str | os.PathLike) -> bool:
    """Whether this is a folder with checkpoints that we have written, and is not itself a model."""
    if not os.path.isdir(name) or os.path.exists(os.path.join(name, MODEL_CONFIG)):
        return False
    return any((folder / MANIFEST).is_file() for folder in checkpoints(Path(name)))


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode: they change if the checkpoint was deleted, or replaced by one of the same step."""
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
