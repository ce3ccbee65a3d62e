"""One checkpoint's manifest: the hash and size of every file, its step, and whether all its weights are finite.

Written after all other files. A checkpoint is read only if every file agrees with its manifest.
"""

import json
import re
from pathlib import Path
from typing import Any

from qwhisper.checkpoint.names import MANIFEST, checkpoint_name, step_in_name
from qwhisper.disk import file_sha256, flush
from qwhisper.errors import CheckpointError
from qwhisper.files import LOADED_SUFFIXES, files_of, read_json

SHA256 = re.compile("[0-9a-f]{64}")


def write_manifest(folder: Path, step: int, finite: bool) -> None:
    """Hash all files, write the manifest, and flush everything to the disk."""
    files = _files(folder)
    entries = {name: {"sha256": file_sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
    manifest = {"step": step, "finite": finite, "files": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint except the manifest, by its path in it. Raises CheckpointError as `files_of` does."""
    files = files_of(folder)
    files.pop(MANIFEST, None)
    return files


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises CheckpointError if there is no readable manifest."""
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
    """Return the manifest after comparing every file with it.

    Raises CheckpointError with the first file that is missing, changed, or not part of this checkpoint.
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
            raise CheckpointError(f"{folder}: {name} was added after the save; move it away")
    return manifest


def _sha256_or_error(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:  # a read error of the disk
        return str(error)


def check_usable(folder: Path) -> None:
    """Raises CheckpointError if a file is not what was written, if a weight is not finite, or if the folder has another
    checkpoint's name.
    """
    try:
        manifest = check_manifest(folder)
    except OSError as error:  # such as a file that a trainer deletes at this moment
        raise CheckpointError(f"{folder}: it can't be read ({error})") from error
    if not manifest["finite"]:
        raise CheckpointError(f"{folder}: a weight in it is not finite; use an older checkpoint")
    step = manifest["step"]
    if (named := step_in_name(folder)) is not None and named != step:
        raise CheckpointError(f"{folder}: it is of step {step}, not {named}; rename it to {checkpoint_name(step)}")


def says_finite(folder: Path) -> bool:
    try:
        return read_manifest(folder)["finite"]
    except CheckpointError:
        return False
