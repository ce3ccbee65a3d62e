"""Facts about a run, read from its checkpoint outside of training: its arguments, and a few values of its state.

A folder from `save_pretrained` alone has none.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwhisper.checkpoint.manifest import read_manifest
from qwhisper.checkpoint.names import ARGUMENTS_FILE, MANIFEST, STATE_FILE, is_checkpoint_name
from qwhisper.checkpoint.places import found_again
from qwhisper.errors import CheckpointError
from qwhisper.files import read_json_object
from qwhisper.typed_json import checked

# The values of arguments.json that are read here, with their types; and those that every run writes.
ARGUMENTS: dict[str, Any] = {
    "output_dir": str,
    "load_in_4bit": bool,
    "load_in_fp8": bool,
    "projector_fp32": bool,
    "train_file": str,
    "data_root": str | None,
    "max_samples": int | None,
    "max_length": int | None,
}
ALWAYS_THERE = ("output_dir", "load_in_4bit", "projector_fp32")


def read_arguments(
    checkpoint: Path, hints: Mapping[str, Any] = ARGUMENTS, needed: Iterable[str] = ALWAYS_THERE
) -> dict[str, Any]:
    """The arguments of the run that wrote a checkpoint, as they are stored.

    Raises CheckpointError if they can't be read, if one of `needed` is missing, or if a value does not have its type in
    `hints`; names without a hint are not checked.
    """
    file = checkpoint / ARGUMENTS_FILE
    saved = read_json_object(file)
    for name in needed:
        if name not in saved:
            raise CheckpointError(f"{file}: {name} is missing")
    try:
        # Flags that another version added or removed are ignored.
        return saved | {name: checked(hints[name], value, name) for name, value in saved.items() if name in hints}
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def run_arguments(checkpoint: Path) -> dict[str, Any]:
    """Like `read_arguments`, with the present paths of files that moved with the run; empty without arguments.json."""
    if not (checkpoint / ARGUMENTS_FILE).is_file():
        return {}
    return found_again(read_arguments(checkpoint), checkpoint.absolute().parent)


def trained_kinds(checkpoint: Path) -> list[str]:
    """The kinds of question in the training data of a checkpoint's run; empty if it does not say."""
    return _of_state(checkpoint, "kinds", list[str]) or []


def trained_file_sha256(checkpoint: Path) -> str | None:
    """Hash of the file that a checkpoint's run was trained on; None if it does not say."""
    return _of_state(checkpoint, "train_file_sha256", str | None)


def best_checkpoint(checkpoint: Path) -> str | None:
    """Name of the best checkpoint of its run when this one was saved; None before the first evaluation."""
    best = read_json_object(checkpoint / STATE_FILE).get("best_checkpoint")
    if best is not None and not is_checkpoint_name(best):
        raise CheckpointError(f"{checkpoint}: its best checkpoint is {best!r:.80}, which is no checkpoint of this run")
    return best


def _of_state(checkpoint: Path, name: str, hint: Any) -> Any:
    """One value of state.json; None without that file. Raises CheckpointError if it is missing or of another type."""
    file = checkpoint / STATE_FILE
    if not file.is_file():
        return None
    values = read_json_object(file)
    refuse_another_step(checkpoint, values.get("step"))
    if name not in values:
        raise CheckpointError(f"{file}: {name} is missing")
    try:
        return checked(hint, values[name], name)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def refuse_another_step(checkpoint: Path, step: Any) -> None:
    """Raises CheckpointError if `step`, that of state.json, is not the step of the manifest beside it."""
    if (checkpoint / MANIFEST).exists() and (written := read_manifest(checkpoint)["step"]) != step:
        raise CheckpointError(f"{checkpoint / STATE_FILE}: is of step {step}, but its {MANIFEST} is of step {written}")
