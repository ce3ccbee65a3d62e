"""Checkpoint folders: written aside, flushed to disk, renamed; read only if every file is what the manifest says.

Knows files and hashes, nothing of models: whoever saves hands over a function that fills a folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qwhisper.errors import CheckpointError, UsageError

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"


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


def write_checkpoint(run_folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Writes `run_folder`/checkpoint-`step`, which appears whole or not at all.

    One that stood there before is replaced. fill: writes all files into the folder that it is given.
    """
    final = run_folder / f"{PREFIX}{step}"
    aside = run_folder / f".{PREFIX}{step}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    fill(aside)
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    entries = {p.relative_to(aside).as_posix(): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in files}
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1), encoding="utf-8")
    for path in [*files, manifest, aside]:
        _flush(path)
    if final.exists():
        old = run_folder / f".{PREFIX}{step}.old"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        aside.rename(final)
        shutil.rmtree(old)
    else:
        aside.rename(final)
    _flush(run_folder)
    return final


def check_manifest(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing or not what was written."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no readable {MANIFEST} ({error})") from None
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} is not what was written (damaged or changed since)")


def checkpoints(run_folder: Path) -> list[Path]:
    """checkpoint-N folders, oldest first."""
    found = [p for p in run_folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def newest_valid(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, or None; and what was wrong with each newer one."""
    damaged: list[str] = []
    for folder in reversed(checkpoints(run_folder)):
        try:
            check_manifest(folder)
            return folder, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint folder from itself, or from its run folder.

    Of a run it is the best one by evaluation, else the newest whole one. Raises UsageError where there is neither,
    CheckpointError where what there is is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{path}: no such folder; give a run folder or one of its {PREFIX}N folders")
    if (folder / MANIFEST).is_file():
        check_manifest(folder)
        return folder
    if not checkpoints(folder):
        if (folder / "projector.safetensors").is_file():  # saved by `save_pretrained`, without a run around it
            return folder
        if folder.name.startswith(PREFIX):
            raise CheckpointError(f"{path}: {MANIFEST} is missing, so nothing in it can be relied on")
        raise UsageError(f"{path}: neither a checkpoint nor a run folder with {PREFIX}N folders in it")
    newest, damaged = newest_valid(folder)
    if newest is None:
        raise CheckpointError(f"{path}: no checkpoint is whole: {'; '.join(damaged)}")
    best = json.loads((newest / "state.json").read_text(encoding="utf-8")).get("best_checkpoint")
    if best and (folder / best).is_dir():
        check_manifest(folder / best)
        return folder / best
    return newest


def rotate(run_folder: Path, keep_last: int, protected: set[str]) -> None:
    """Deletes all but the newest `keep_last` checkpoints; those named in `protected` stay whatever their age."""
    for folder in checkpoints(run_folder)[:-keep_last]:
        if folder.name not in protected:
            shutil.rmtree(folder)
