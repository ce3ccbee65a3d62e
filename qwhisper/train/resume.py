"""What a resumed run is told differently from the one that it goes on with: said, or refused."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, get_type_hints

from qwhisper.checkpoint.places import absolute, found_again
from qwhisper.errors import CheckpointError, DataError, UsageError
from qwhisper.files import read_json_object
from qwhisper.model.adapter_config import read_adapter_config
from qwhisper.model.saving import ADAPTER_FILE, adapter_folder
from qwhisper.train.arguments import TrainArguments
from qwhisper.typed_json import checked

ARGUMENTS_FILE = "arguments.json"
# Made when the run began and read from the checkpoint since: another value would have no effect.
MADE_AT_THE_START = (
    "use_lora",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_fp32",
    "projector_fp32",
    "freeze_whisper",
    "audio_lead_silence",
    "audio_tail_silence",
)
# Say where things lie, not what is computed. The bases are told apart by their fingerprints.
PLACES = ("output_dir", "run_name", "resume_from_checkpoint", "init_from", "audio_model", "text_model", "hub")


def save_arguments(args: TrainArguments, folder: Path) -> None:
    """With absolute paths: what is loaded from another current folder finds the same files."""
    text = json.dumps(absolute(dataclasses.asdict(args)), indent=1)
    (folder / ARGUMENTS_FILE).write_text(text, encoding="utf-8")


def saved_arguments(checkpoint: Path) -> dict[str, Any]:
    """What the run that wrote a checkpoint was told. Raises CheckpointError where that can't be read."""
    file = checkpoint / ARGUMENTS_FILE
    saved, hints = read_json_object(file), get_type_hints(TrainArguments)
    for name in ("output_dir", "load_in_4bit", *MADE_AT_THE_START):
        if name not in saved:
            raise CheckpointError(f"{file}: {name} is missing")
    try:
        # Flags that came or went with another version are passed over.
        return saved | {name: checked(hints[name], value, name) for name, value in saved.items() if name in hints}
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_arguments(checkpoint: Path) -> None:
    """Raises CheckpointError where what the run was told is not what its model and adapter are.

    A run with --init_from has the adapter of that checkpoint, whatever the flags say.
    """
    told, config = saved_arguments(checkpoint), read_json_object(checkpoint / "config.json")
    are = {name: config.get(name) for name in ("audio_lead_silence", "audio_tail_silence") if told[name] is not None}
    if not told.get("init_from"):
        are["use_lora"] = (adapter_folder(checkpoint) / ADAPTER_FILE).is_file()
        if are["use_lora"]:
            adapter = read_adapter_config(adapter_folder(checkpoint))
            are |= {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
    for name, value in are.items():
        if told[name] != value:
            raise CheckpointError(
                f"{checkpoint}: {ARGUMENTS_FILE} has {name} {told[name]}, but the checkpoint has {value}"
            )


def arguments_where_they_lie(checkpoint: Path) -> dict[str, Any]:
    """`saved_arguments`, with paths that have moved together with the run where they are now."""
    return found_again(saved_arguments(checkpoint), checkpoint.absolute().parent)


def refuse_missing_data(args: TrainArguments) -> None:
    """Raises DataError where the data of a run that is resumed does not lie where its config.yaml says."""
    for name in ("train_file", "eval_file", "data_root"):
        path = getattr(args, name)
        if path and not os.path.exists(path):
            raise DataError(f"{path} does not exist: if it has moved, give its place with --{name}")


def output_dir_of(checkpoint: Path) -> Path:
    """Of the run that saved it, as it was called then."""
    return Path(saved_arguments(checkpoint).get("output_dir", ""))


def changed_arguments(args: TrainArguments, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
    """Name to (value then, value now) of the flags that differ from what the checkpoint's run was told.

    Raises UsageError for one that can't be changed on the way, CheckpointError where the old ones can't be read.
    """
    check_arguments(checkpoint)
    then = absolute(arguments_where_they_lie(checkpoint))
    now = absolute(json.loads(json.dumps(dataclasses.asdict(args))))
    names = (then.keys() & now.keys()) - set(PLACES)
    changed = {name: (then[name], now[name]) for name in sorted(names) if then[name] != now[name]}
    for name in MADE_AT_THE_START:
        if name in changed:
            was, wanted = changed[name]
            raise UsageError(
                f"--{name} is {wanted}, but {checkpoint} was made with {was}, which can't be changed on the way: leave "
                "the flag as it was, or begin a new run with --init_from"
            )
    return changed
