"""Find a base by its fingerprint: at its path in training, or beside the folder of trained weights."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwhisper.errors import CheckpointError, UsageError
from qwhisper.model.bases import NO_ACCESS, fingerprint, resolve_model

# The checkpoint's folder, the run's folder, and the two above.
FOLDERS_ABOVE = 3
# Parts of the stored path that are looked up there: `qwen3`, `bases/qwen3`, `project/bases/qwen3`.
LONGEST_NAME = 3
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_base(
    trained: str | os.PathLike, role: str, base: dict[str, str], access: Mapping[str, Any] = NO_ACCESS
) -> str:
    """An absolute path or hub id of a base with the fingerprint that it had in training.

    trained: folder (or hub id) of trained weights; role: "audio" or "text"; base: {"name", "fingerprint"} of its
    configuration; access: keywords for downloads. Raises UsageError if no such base is found, CheckpointError if
    another model is at its path.
    """
    stored, wanted = str(base["name"]), base["fingerprint"]
    for place in (stored, *beside(trained, stored)):
        if os.path.isdir(place) and _fingerprint_or_none(place) == wanted:
            return os.path.abspath(place)
    flag = f"--{role}_model"
    advice = f"give its place with {flag} (in Python: {role}_model=)"
    if os.path.isdir(stored):
        raise CheckpointError(f"{trained} was trained on another {role} base than {stored} is now: {advice}")
    looked = f"{stored} (no such folder)"
    if HUB_ID.fullmatch(stored):
        try:
            if fingerprint(resolve_model(stored, "huggingface", flag, access), access) == wanted:
                return stored
            looked = f"{stored} (another model)"
        except (UsageError, OSError) as error:
            looked = f"{stored} (not there: {error})"
    names = " or ".join(_names(stored))
    folders = ", ".join(map(str, _folders(trained))) or "no folder beside it"
    raise UsageError(
        f"{trained}: its {role} base was not found. Looked at {looked} and for {names} in {folders}: {advice}"
    )


def beside(trained: str | os.PathLike, stored: str) -> list[str]:
    """Paths of the base if it moved together with the folder of trained weights, nearest first."""
    return [str(folder / name) for folder in _folders(trained) for name in _names(stored)]


def _folders(trained: str | os.PathLike) -> list[Path]:
    if not os.path.isdir(trained):  # on the hub
        return []
    found: list[Path] = []
    # The run's path may contain a link.
    for folder in (Path(os.path.abspath(trained)), Path(os.path.realpath(trained))):
        found += [each for each in [folder, *folder.parents][: 1 + FOLDERS_ABOVE] if each not in found]
    return found


def _names(stored: str) -> list[str]:
    """The last parts of a path, possibly of another operating system, or of a hub id."""
    parts = [part for part in re.split(r"[\\/]+", stored) if part not in ("", ".", "..")]
    return ["/".join(parts[-count:]) for count in range(1, min(LONGEST_NAME, len(parts)) + 1)]


def _fingerprint_or_none(folder: str) -> str | None:
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return None
    try:
        return fingerprint(folder)
    except (UsageError, OSError, ValueError, LookupError, TypeError):  # not a whole model, or an index of other shards
        return None
