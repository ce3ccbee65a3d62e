"""Checkpoint folders: written aside, flushed to disk, renamed; read only if every file is what the manifest says.

Knows files and hashes, nothing of models or torch: whoever saves hands over a function that fills a folder.

A save can be killed anywhere. What it leaves then is a hidden folder that nobody reads (`.checkpoint-N.writing`,
`.checkpoint-N.deleting`), or, where a step is saved for the second time, the first one under a hidden name
(`.checkpoint-N.old`), which counts until its successor is there. The next save clears them away.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from qwhisper.errors import CheckpointError, QwhisperError, UsageError
from qwhisper.files import LOADED_SUFFIXES, files_of, read_json, read_json_object

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"
WRITING, DELETING, OLD = ".writing", ".deleting", ".old"
ASIDE = "aside-"
ATTEMPTS = 5  # to read a run whose checkpoints a trainer renames and deletes meanwhile
SHA256 = re.compile("[0-9a-f]{64}")
# How the tokenizer's and safetensors' libraries, which are not Python, report what Python calls an OSError.
FOREIGN_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Makes sure a file's content, or a folder's list of names, is on the disk and not only promised."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """A text file that is there with all of `text`, or as it was before."""
    aside = path.with_name(f".{path.name}{WRITING}")
    try:
        aside.write_text(text, encoding="utf-8")
        _flush(aside)
    except OSError:
        _remove(aside)
        raise
    aside.replace(path)
    _flush(path.parent)


def write_checkpoint(run_folder: Path, step: int, fill: Callable[[Path], None], *, finite: bool = True) -> Path:
    """Writes `run_folder`/checkpoint-`step`, which appears whole or not at all.

    One that stood there before is replaced. fill: writes all files into the folder that it is given. finite: whether
    all weights are; a checkpoint without is never gone on from. Raises OSError where the disk does not take it, and
    leaves all checkpoints as they were.
    """
    _clear_leftovers(run_folder)
    final = run_folder / f"{PREFIX}{step}"
    aside, old = _free(run_folder, f".{final.name}", WRITING), final.with_name(f".{final.name}{OLD}")
    try:
        aside.mkdir(parents=True)
        fill(aside)
        _write_manifest(aside, step, finite)
        if final.exists():
            final.rename(old)
        aside.rename(final)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, Exception) and (found := FOREIGN_OS_ERROR.search(str(error))):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise
    _flush(run_folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _write_manifest(folder: Path, step: int, finite: bool) -> None:
    """Hashes what is there, and brings all of it to the disk."""
    files = _files(folder)
    entries = {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
    manifest = {"step": step, "finite": finite, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint but the manifest, by its path in it. Raises CheckpointError as `files_of` does."""
    files = files_of(folder)
    files.pop(MANIFEST, None)
    return files


def _free(parent: Path, name: str, suffix: str = "") -> Path:
    """`name` or, where there is such a file already, the first of `name`-1, `name`-2, … that there is not."""
    paths = (parent / f"{name}{f'-{n}' if n else ''}{suffix}" for n in count())
    return next(path for path in paths if not os.path.lexists(path))


def _remove(path: Path) -> None:
    """A file, folder or link; as much of it as the disk lets go."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _clear_leftovers(run_folder: Path) -> None:
    """Puts away what a killed save left behind."""
    for folder in run_folder.glob(f".{PREFIX}*"):
        replaced = folder.with_name(folder.stem.removeprefix("."))
        if folder.suffix == OLD and not replaced.exists():
            folder.rename(replaced)
        elif folder.suffix in (WRITING, DELETING, OLD):
            _remove(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError where there is none that can be read."""
    try:
        manifest = read_json(folder / MANIFEST)
        entries = manifest["files"].values()
        complete = all(SHA256.fullmatch(entry["sha256"]) and type(entry["bytes"]) is int for entry in entries)
        if not complete or type(manifest["finite"]) is not bool or type(manifest["step"]) is not int:
            raise ValueError("not as it was written")
        if manifest["step"] < 0:
            raise ValueError(f"step {manifest['step']}")
        return manifest
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error})") from None


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every file as it says.

    Raises CheckpointError naming the first file that is missing, not what was written, or not of this checkpoint.
    """
    manifest = read_manifest(folder)
    entries = manifest["files"]
    files = _files(folder)
    for name, entry in entries.items():
        if name not in files:
            raise CheckpointError(f"{folder}: {name} is missing")
        if files[name].stat().st_size != entry["bytes"] or _sha256_or_error(files[name]) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} is not what was written (damaged or changed since)")
    for name in files.keys() - entries.keys():
        if name.endswith(LOADED_SUFFIXES):
            raise CheckpointError(f"{folder}: {name} was added since it was written; move it away")
    return manifest


def _sha256_or_error(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:  # a disk that no longer gives back what it holds
        return str(error)


def check_usable(folder: Path) -> None:
    """Raises CheckpointError where a file is not what was written, a weight was not finite when it was, or the name is
    another checkpoint's.
    """
    try:
        manifest = check_manifest(folder)
    except OSError as error:  # such as a file that a trainer deletes at this moment
        raise CheckpointError(f"{folder}: it can't be read ({error})") from error
    if not manifest["finite"]:
        raise CheckpointError(f"{folder}: a weight in it is not finite; go on from an older checkpoint")
    if (named := _step_in_name(folder)) is not None and named != manifest["step"]:
        raise CheckpointError(
            f"{folder}: it is of step {manifest['step']}, not {named}; call it {PREFIX}{manifest['step']} again"
        )


def checkpoints(run_folder: Path) -> list[Path]:
    """checkpoint-N folders, oldest first; N alone says which is older, not the clock."""
    found = _by_step(run_folder)
    return [found[step] for step in sorted(found)]


def put_aside_later(run_folder: Path, resumed: Path) -> list[Path]:
    """Renames the checkpoints of later steps than `resumed`, oldest first, and returns their new names.

    They belong to another course of the run: they must neither count among the newest that are kept nor be gone on
    from. `resumed` may lie elsewhere, as a copy does.
    """
    resumed_step = read_manifest(resumed)["step"]
    later = [(step, folder) for step, folder in sorted(_by_step(run_folder).items()) if step > resumed_step]
    return [folder.rename(_free(run_folder, f"{ASIDE}{PREFIX}{step}")) for step, folder in later]


def is_checkpoint_name(name: Any) -> bool:
    """Whether it names a folder beside the one that mentions it."""
    return isinstance(name, str) and re.fullmatch(rf"{PREFIX}[0-9]+", name) is not None


def _step_in_name(folder: Path) -> int | None:
    """The N of checkpoint-N, also under the hidden name that it has where a kill came in a replacement."""
    found = re.fullmatch(rf"{PREFIX}([0-9]+)|\.{PREFIX}([0-9]+){re.escape(OLD)}", folder.name)
    return int(found[1] or found[2]) if found else None


def _by_step(run_folder: Path) -> dict[int, Path]:
    folders = [*run_folder.glob(f".{PREFIX}*{OLD}"), *run_folder.glob(f"{PREFIX}*")]
    steps = [(_step_in_name(folder), folder) for folder in folders if folder.is_dir()]
    return {step: folder for step, folder in steps if step is not None}


def _seen(run_folder: Path) -> set[tuple[str, int]]:
    """Name and inode of each checkpoint. Another set later: a trainer has saved or deleted one meanwhile."""
    seen = set()
    for folder in run_folder.glob(f"*{PREFIX}*"):
        with suppress(OSError):
            seen.add((folder.name, folder.stat().st_ino))
    return seen


def newest_valid(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole and finite, or None; and what was wrong with each newer one.

    Looks again where a trainer saves or deletes checkpoints at the same time, a few times at most.
    """
    for _ in range(ATTEMPTS):
        before = _seen(run_folder)
        newest, passed_over = _newest_valid(run_folder)
        if (newest and not passed_over) or _seen(run_folder) == before:
            break
    return newest, passed_over


def _newest_valid(run_folder: Path) -> tuple[Path | None, list[str]]:
    passed_over: list[str] = []
    for folder in reversed(checkpoints(run_folder)):
        try:
            check_usable(folder)
            return folder, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint folder from itself, or from its run folder.

    Of a run it is the best one by evaluation, else the newest that is whole and finite. Raises UsageError where there
    is neither, CheckpointError where what there is is damaged or not finite. A trainer may save and delete checkpoints
    of the run at the same time.
    """
    folder = Path(path)
    for _ in range(ATTEMPTS):
        before = _seen(folder)
        try:
            return _resolve(folder)
        except (QwhisperError, OSError) as error:
            failed = error
        if _seen(folder) == before:
            break
    if isinstance(failed, OSError):
        raise CheckpointError(f"{path}: it can't be read ({failed})") from failed
    raise failed


def _resolve(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; {_instead(folder)}")
    if os.path.lexists(folder / MANIFEST):
        check_usable(folder)
        return folder
    by_a_run = folder.name.startswith(PREFIX) and os.path.lexists(folder / "state.json")
    if _holds_model(folder) and not by_a_run:  # saved by `save_pretrained`, without a run around it
        files_of(folder)
        return folder
    if not checkpoints(folder):
        if folder.name.startswith(PREFIX):
            raise CheckpointError(f"{folder}: {MANIFEST} is missing, so nothing in it can be relied on")
        raise UsageError(f"{folder}: neither a checkpoint nor a run folder with {PREFIX}N folders in it")
    newest, passed_over = newest_valid(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no checkpoint can be used: {'; '.join(passed_over)}")
    best = read_json_object(newest / "state.json").get("best_checkpoint")
    if best is not None and not is_checkpoint_name(best):
        raise CheckpointError(f"{newest}: its best checkpoint is {best!r:.80}, which is no checkpoint of this run")
    if best and best != newest.name and (folder / best).is_dir():
        check_usable(folder / best)
        return folder / best
    return newest


def _instead(missing: Path) -> str:
    """What to give in the place of a folder that is not there."""
    others = checkpoints(missing.parent) if missing.name.startswith(PREFIX) else []
    if others:
        return f"the newest checkpoint of {missing.parent} is {others[-1].name}"
    return f"give a run folder or one of its {PREFIX}N folders"


def _holds_model(folder: Path) -> bool:
    """Trained weights, or a whole model of ours."""
    if (folder / "projector.safetensors").is_file():
        return True
    try:
        return read_json_object(folder / "config.json").get("model_type") == "qwen3_audio"
    except CheckpointError:
        return False


def rotate(run_folder: Path, keep_last: int, protected: set[str]) -> None:
    """Deletes all but the newest `keep_last` checkpoints.

    Those named in `protected` stay whatever their age, and so does the newest one whose weights are finite.
    """
    found = checkpoints(run_folder)
    healthy = next((folder.name for folder in reversed(found) if _says_finite(folder)), None)
    for folder in found[:-keep_last]:
        if folder.name not in protected | {healthy}:
            # By a name that nobody reads: a kill in the middle leaves no half of a checkpoint.
            _remove(folder.rename(_free(run_folder, f".{folder.name}", DELETING)))


def _says_finite(folder: Path) -> bool:
    try:
        return read_manifest(folder)["finite"]
    except CheckpointError:
        return False
