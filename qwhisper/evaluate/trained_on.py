"""Finds evaluation data that a checkpoint was trained on."""

from collections.abc import Sequence
from pathlib import Path

from qwhisper.checkpoint.facts import run_arguments, trained_file_sha256
from qwhisper.data import leakage
from qwhisper.data.dialogue import Dialogue, scan_dialogues
from qwhisper.disk import file_sha256
from qwhisper.errors import CheckpointError, QwhisperError, first_line


def shared_with_training(folder: Path, eval_file: str, dialogues: Sequence[Dialogue]) -> list[str]:
    """Sentences about evaluation data that the checkpoint was trained on, as far as this can be found out."""
    train_file_sha256 = trained_file_sha256(folder)
    if train_file_sha256 is None:  # not saved by a run of qwhisper
        return []
    if train_file_sha256 == file_sha256(eval_file):
        return [f"{eval_file} is what {folder.name} was trained on: its scores say what was learned by heart."]
    try:
        trained_on = run_arguments(folder)
        if "train_file" not in trained_on:
            raise CheckpointError(f"{folder} does not name its training file")
        train_file = str(trained_on["train_file"])
        trained, faults = scan_dialogues(
            train_file, data_root=trained_on.get("data_root"), max_samples=trained_on.get("max_samples")
        )
    except (QwhisperError, OSError, KeyError, TypeError, ValueError) as error:
        return [f"Whether {eval_file} shares dialogues with the training data was not checked: {first_line(error)}."]
    notes = leakage.notes(eval_file, dialogues, train_file, trained)
    if faults:
        notes.append(f"not compared with the dialogues of {train_file} that can no longer be read ({faults[0]})")
    return [f"{note[0].upper()}{note[1:]}." for note in notes]
