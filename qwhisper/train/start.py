"""The start of a training: a new run in its own folder, or a resumed checkpoint and what has changed since.

A folder that holds another run is refused; nothing in it is overwritten.
"""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from qwhisper import disk
from qwhisper.checkpoint import folders
from qwhisper.checkpoint.facts import trained_kinds
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.manifest import check_usable
from qwhisper.checkpoint.places import CONFIG_FILE, HEADING, absolute, written_by_a_run
from qwhisper.checkpoint.reading import newest_usable, read_checkpoint
from qwhisper.data.dialogue import Dialogue
from qwhisper.errors import CheckpointError, DiskError, UsageError
from qwhisper.report.terminal import note, say
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.learning import Learning
from qwhisper.train.plan import Plan, defaults_from_flags, with_values
from qwhisper.train.resume import changed_arguments, output_dir_of
from qwhisper.train.state import TrainState

DECIDE_THE_LOSS = {"train_file", "eval_file", "max_samples", "max_length", "train_on", "distill_weight"}


def find_resume_point(args: TrainArguments, folder: Path) -> Path | None:
    """The checkpoint to resume, or None for a new run, which must not overwrite another."""
    if not args.resume_from_checkpoint:
        if checkpoints(folder):
            raise UsageError(
                f"--output_dir {folder} holds another run. To resume it: {resume_command(folder)}. "
                "For a new run give another folder; nothing was changed"
            )
        if holds_run(folder):
            raise UsageError(
                f"--output_dir {folder} holds a {CONFIG_FILE} that would be overwritten: rename it, or give another "
                "folder; nothing was changed"
            )
        return None
    if args.resume_from_checkpoint != "latest":
        return given_checkpoint(Path(args.resume_from_checkpoint), folder)
    newest, passed_over = newest_usable(folder)
    for line in passed_over:
        say(f"skipped a damaged checkpoint: {line}", to_stderr=True)
    if newest is None and passed_over:
        raise CheckpointError(f"{folder}: no checkpoint is whole and finite; start again in another folder")
    if newest is None:
        raise nothing_to_resume(folder)
    say(f"resuming from {newest}")
    return newest


def refuse_missing_run(args: TrainArguments) -> None:
    """Raises UsageError for a resume in a folder that holds no run. Creates nothing there, not even the lock."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest" and not (holds_run(folder) or (folder / CONFIG_FILE).exists()):
        raise nothing_to_resume(folder)


def nothing_to_resume(folder: Path) -> UsageError:
    looked = f"--resume_from_checkpoint: there is no checkpoint in {os.path.abspath(folder)} (--output_dir)"
    if not folder.is_dir():
        return UsageError(f"{looked}, and no such folder: give the run's folder, or --config with its {CONFIG_FILE}")
    if (folder / CONFIG_FILE).exists() and written_by_a_run(folder / CONFIG_FILE):
        return UsageError(f"{looked}: the run ended before its first save. To start it again: {start_command(folder)}")
    return UsageError(f"{looked}: give the run's folder, or start a new run without --resume_from_checkpoint")


def given_checkpoint(path: Path, folder: Path) -> Path:
    """The checkpoint that --resume_from_checkpoint names. It may be a copy of one of this run, or belong to another run
    that continues in a new folder.
    """
    path = path.resolve()  # `.` and links have another name and parent
    if not path.is_dir() or checkpoints(path):
        raise UsageError(
            f"--resume_from_checkpoint {path}: no checkpoint-N folder. Without a value it resumes the newest of "
            f"--output_dir {folder}"
        )
    check_usable(path)
    own, saved_by = folder.resolve(), output_dir_of(path).resolve()
    if own not in (path.parent, saved_by) and holds_run(folder) and saved_by not in former_places(folder):
        raise UsageError(
            f"--output_dir {folder} holds another run than {path}, which the run in {saved_by} saved: give a "
            "new folder, or copy the checkpoint into its run's folder; nothing was changed"
        )
    return path


def holds_run(folder: Path) -> bool:
    """Whether the folder has a checkpoint, or a config.yaml that no run wrote. Neither may be overwritten; a run that
    ended before its first checkpoint may be started again.
    """
    config = folder / CONFIG_FILE
    return bool(checkpoints(folder)) or (config.exists() and not written_by_a_run(config))


def former_places(folder: Path) -> set[Path]:
    """The earlier folders of the run in `folder`, as its checkpoints name them."""
    places = set()
    for path in checkpoints(folder):
        with suppress(CheckpointError):
            places.add(output_dir_of(path).resolve())
    return places


def put_later_aside(folder: Path, resumed: Path) -> None:
    """Rename the checkpoints of later steps than `resumed`, and print their new names."""
    for path in folders.put_aside_later(folder, resumed):
        say(f"renamed a checkpoint of a later step: {path}")


def state_at_start(args: TrainArguments, plan: Plan, dialogues: Sequence[Dialogue], resumed: Path | None) -> TrainState:
    """The state at step 0, or that of the resumed checkpoint."""
    train_file_sha256 = disk.file_sha256(Path(args.train_file))
    state = TrainState.load(resumed) if resumed else TrainState(train_file_sha256=train_file_sha256)
    if resumed:
        adopt_changes(with_values(args, vars(plan)), resumed, state, train_file_sha256)
    kinds = {message.kind for dialogue in dialogues for message in dialogue.messages if message.kind}
    earlier = read_checkpoint(args.init_from, trained_kinds) if args.init_from and not resumed else []
    state.kinds = sorted(kinds.union(state.kinds, earlier))
    return state


def adopt_changes(args: TrainArguments, resumed: Path, state: TrainState, train_file_sha256: str) -> None:
    """Print what has changed since the checkpoint. A changed --max_tokens_per_pack or --execution replaces the run's
    current one.
    """
    changed = changed_arguments(args, resumed)
    if state.train_file_sha256 != train_file_sha256 or changed.keys() & DECIDE_THE_LOSS:
        state.learning = Learning()  # earlier losses can't be compared with later ones
    if "max_tokens_per_pack" in changed:
        state.max_tokens_per_pack = None
    if "execution" in changed:
        state.execution = None
    if changed:
        changes = ", ".join(f"--{name} {now} (was {was})" for name, (was, now) in changed.items())
        note(f"{resumed.name} continues with {changes}")
    if state.train_file_sha256 != train_file_sha256:
        note(
            f"{args.train_file} has changed since {resumed.name}: the order of samples is kept, their content "
            "may differ"
        )


def start_command(folder: Path) -> str:
    """The shell command that starts the run again, from any current folder."""
    return f"qwhisper train --config {shlex.quote(os.path.abspath(folder / CONFIG_FILE))}"


def resume_command(folder: Path) -> str:
    return f"{start_command(folder)} --resume_from_checkpoint"


def continue_command(folder: Path, resumed: Path | None) -> str:
    """The command that continues a run after a signal. resumed: the checkpoint with which it began, if there was one.

    Before its first save, a run that resumed another folder's checkpoint has none in its own.
    """
    if checkpoints(folder):
        return resume_command(folder)
    return f"{resume_command(folder)} {shlex.quote(os.path.abspath(resumed))}" if resumed else start_command(folder)


def write_config(args: TrainArguments, folder: Path, resumed: Path | None) -> None:
    """Write the config.yaml with which `qwhisper train --config` repeats the run from any current folder.

    Leaves out values that depend on the length of the run: a longer run from the same file computes its own. If the
    file can't be written, a resumed run keeps the existing one. Raises DiskError if there is none.
    """
    values = absolute(dataclasses.asdict(with_values(args, defaults_from_flags(args))))
    values = {name: value for name, value in values.items() if value is not None and name != "resume_from_checkpoint"}
    text = f"{HEADING}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    try:
        disk.write_whole(folder / CONFIG_FILE, text)
    except OSError as error:
        if resumed is None or not (folder / CONFIG_FILE).exists():
            raise DiskError(
                f"{folder / CONFIG_FILE}: can't be written ({error}): make room, or give another folder"
            ) from None
        note(f"{folder / CONFIG_FILE} can't be written and is unchanged: {error}")
