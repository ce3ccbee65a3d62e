"""A run's checkpoint folders: written under a hidden name, flushed to the disk, renamed; listed, put aside, rotated.

Handles files and hashes, not models or torch: the caller passes a function that fills a folder.

A save can be killed anywhere. It then leaves a hidden folder that is never read (`.checkpoint-N.writing`,
`.checkpoint-N.deleting`). If a step is saved for the second time, the first checkpoint keeps a hidden name
(`.checkpoint-N.old`) and counts until its successor is complete. The next save removes these leftovers.
"""

import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from qwhisper.checkpoint.manifest import read_manifest, says_finite, write_manifest
from qwhisper.checkpoint.names import OLD, PREFIX, checkpoint_name, step_in_name
from qwhisper.disk import WRITING, flush, remove

DELETING = ".deleting"
ASIDE = "aside-"
# How the native libraries tokenizers and safetensors report what Python calls an OSError.
FOREIGN_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_checkpoint(run_folder: Path, step: int, fill: Callable[[Path], None], *, finite: bool = True) -> Path:
    """Write `run_folder`/checkpoint-`step`, which appears whole or not at all; replace an earlier one of this step.

    fill: writes all files into the given folder. finite: whether all weights are finite; if not, no run resumes from
    this checkpoint. Raises OSError if it can't be written, and leaves all checkpoints unchanged.
    """
    _clear_leftovers(run_folder)
    final = run_folder / checkpoint_name(step)
    aside, old = _free(run_folder, f".{final.name}", WRITING), final.with_name(f".{final.name}{OLD}")
    try:
        aside.mkdir(parents=True)
        fill(aside)
        write_manifest(aside, step, finite)
        if final.exists():
            final.rename(old)
        aside.rename(final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, Exception) and (found := FOREIGN_OS_ERROR.search(str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise
    flush(run_folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _free(parent: Path, name: str, suffix: str = "") -> Path:
    """The first of `name`, `name`-1, `name`-2, … that does not exist yet, each with `suffix`."""
    paths = (parent / f"{name}{f'-{n}' if n else ''}{suffix}" for n in count())
    return next(path for path in paths if not os.path.lexists(path))


def _clear_leftovers(run_folder: Path) -> None:
    """Delete what a killed save left behind, or rename it back."""
    for folder in run_folder.glob(f".{PREFIX}*"):
        replaced = folder.with_name(folder.stem.removeprefix("."))
        if folder.suffix == OLD and not replaced.exists():
            folder.rename(replaced)
        elif folder.suffix in (WRITING, DELETING, OLD):
            remove(folder)


def checkpoints(run_folder: Path) -> list[Path]:
    """A run's checkpoint-N folders, oldest first, in the order of N and not of their times."""
    found = by_step(run_folder)
    return [found[step] for step in sorted(found)]


def by_step(run_folder: Path) -> dict[int, Path]:
    folders = [*run_folder.glob(f".{PREFIX}*{OLD}"), *run_folder.glob(f"{PREFIX}*")]
    steps = [(step_in_name(folder), folder) for folder in folders if folder.is_dir()]
    return {step: folder for step, folder in steps if step is not None}


def put_aside_later(run_folder: Path, resumed: Path) -> list[Path]:
    """Rename the checkpoints of later steps than `resumed`, oldest first, and return their new names.

    They belong to another course of the run. They must not count among the newest that are kept, and not be resumed.
    `resumed` may be a copy in another folder.
    """
    resumed_step = read_manifest(resumed)["step"]
    later = [(step, folder) for step, folder in sorted(by_step(run_folder).items()) if step > resumed_step]
    return [folder.rename(_free(run_folder, f"{ASIDE}{PREFIX}{step}")) for step, folder in later]


def rotate(run_folder: Path, keep_last: int, protected: set[str]) -> None:
    """Delete all but the newest `keep_last` checkpoints, those named in `protected`, and the newest whose weights are
    finite.
    """
    found = checkpoints(run_folder)
    healthy = next((folder.name for folder in reversed(found) if says_finite(folder)), None)
    for folder in found[:-keep_last]:
        if folder.name not in protected | {healthy}:
            # Delete under a name that is never read: a kill then leaves no half checkpoint.
            remove(folder.rename(_free(run_folder, f".{folder.name}", DELETING)))
