"""Paths in a run's arguments: stored as absolute paths, and found again after the run has moved."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.names import MANIFEST
from qwhisper.locks import LOCK_FILE

CONFIG_FILE = "config.yaml"
PATHS = ("train_file", "eval_file", "data_root", "init_from", "feature_cache")
BASES = ("audio_model", "text_model")  # a hub id, or a folder
# The first line of a config.yaml that a run wrote. A file without it is a user's own, and is never overwritten.
HEADING = "# Written by qwhisper train. If this folder moves, its new place is the run's output_dir."


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with absolute paths, so that they mean the same in any current folder."""
    placed = dict(values)
    for name in ("output_dir", *PATHS, *BASES, "resume_from_checkpoint"):
        value = placed.get(name)
        if value and (name in ("output_dir", *PATHS) or os.path.isdir(value)):
            placed[name] = os.path.abspath(value)
    return placed


def found_again(values: Mapping[str, Any], run_folder: Path) -> dict[str, Any]:
    """The values that `absolute` made, for a run whose folder is now `run_folder`.

    A path that no longer exists is looked up at the same place relative to the run, so that a tree can be moved as a
    whole.
    """
    was, now = values.get("output_dir"), os.path.abspath(run_folder)
    if not isinstance(was, str):
        return dict(values)
    placed = dict(values) | {"output_dir": now}
    for name in (*PATHS, *BASES) if os.path.isabs(was) else ():
        value = placed.get(name)
        if isinstance(value, str) and os.path.isabs(value) and not os.path.exists(value):
            way = os.path.relpath(value, was)
            beside = [
                os.path.normpath(os.path.join(run, way)) for run in (now, os.path.realpath(now))
            ]  # now: or a link
            placed[name] = next(filter(os.path.exists, beside), value)
    return placed


def run_of_config(config: Path) -> Path | None:
    """The folder of the run that wrote `config`, if the file is in it; None for any other recipe.

    A copy in a folder that holds no run is the recipe of a new run, with the output_dir in the file.
    """
    folder = config.absolute().parent
    if config.name != CONFIG_FILE:
        return None
    saved = any((checkpoint / MANIFEST).is_file() for checkpoint in checkpoints(folder))
    return folder if saved or (written_by_a_run(config) and (folder / LOCK_FILE).exists()) else None


def written_by_a_run(config: Path) -> bool:
    with config.open(encoding="utf-8", errors="replace") as lines:
        return lines.readline().rstrip("\n") == HEADING
