"""`qwhisper train`: from arguments to a finished run folder.

Everything that can be refused is refused before a model is loaded.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback

from qwhisper import disk
from qwhisper.checkpoint import folders
from qwhisper.checkpoint.facts import trained_kinds
from qwhisper.checkpoint.folders import checkpoints
from qwhisper.checkpoint.manifest import check_usable
from qwhisper.checkpoint.places import CONFIG_FILE, HEADING, absolute, written_by_a_run
from qwhisper.checkpoint.reading import newest_usable, read_checkpoint
from qwhisper.data import leakage
from qwhisper.data.dialogue import Dialogue, in_words, read_dialogues, unused_notes
from qwhisper.data.loader import EncodedDialogues, step_samples
from qwhisper.engine.kernels import check_kernels
from qwhisper.errors import CheckpointError, DiskError, MemoryLimitError, UsageError, first_line
from qwhisper.locks import run_lock
from qwhisper.memory import is_out_of_memory
from qwhisper.model.processing_qwen3_audio import Qwen3AudioProcessor
from qwhisper.report.streams import unfailing_output
from qwhisper.report.terminal import quieten_transformers
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.assemble import assemble_run, build, collator_for
from qwhisper.train.context import Session
from qwhisper.train.ending import closing_line, in_events, refuse_to_have_learned_nothing
from qwhisper.train.hf import ConfiguringCallback, tracker_callbacks
from qwhisper.train.learning import Learning
from qwhisper.train.loop import train
from qwhisper.train.optimizer import all_steps, settled, warmup_steps
from qwhisper.train.resume import changed_arguments, output_dir_of, refuse_missing_data, saved_arguments
from qwhisper.train.saving import restore
from qwhisper.train.state import TrainState

DECIDE_THE_LOSS = {"train_file", "eval_file", "max_samples", "max_length", "train_on", "distill_weight"}


def main(args: TrainArguments, callbacks: Sequence[TrainerCallback] = ()) -> int:
    """Runs a training and returns its exit code. callbacks: any `TrainerCallback`s; ours configure the run."""
    begun: list[Session] = []  # a run that was refused has no log: its folder may be another run's

    def log_lost_output(lines: int) -> None:
        for session in begun:
            session.log.event("output_lost", step=session.state.step, lines=lines)

    with unfailing_output(on_lost=log_lost_output):
        return configure_and_go(args, callbacks, begun.append)


def configure_and_go(
    args: TrainArguments, callbacks: Sequence[TrainerCallback], on_begin: Callable[[Session], None]
) -> int:
    for callback in callbacks:
        if isinstance(callback, ConfiguringCallback):
            args = callback.configure(args)
    quieten_transformers()
    for notice in args.notices():
        print(f"note: {notice}")
    refuse_missing_run(args)
    try:
        with run_lock(Path(args.output_dir)):
            return prepare_and_go(args, callbacks, on_begin)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        folder = Path(args.output_dir)
        go_on = f", then go on with: {resume_command(folder)}" if checkpoints(folder) else ""
        raise MemoryLimitError(
            f"out of memory outside of a forward and backward pass, where a smaller pack is no help: "
            f"{first_line(error)}. Use --load_in_4bit, --whisper_cpu, --gradient_checkpointing or a smaller "
            f"--text_model or --lora_r{go_on}"
        ) from error


def prepare_and_go(
    args: TrainArguments, callbacks: Sequence[TrainerCallback], on_begin: Callable[[Session], None]
) -> int:
    folder = Path(args.output_dir)
    resumed = find_resume_point(args, folder)
    trackers = tracker_callbacks(args.report_to)
    if resumed:
        refuse_missing_data(args)
    dialogues = read_dialogues(args.train_file, data_root=args.data_root, max_samples=args.max_samples)
    held_out = read_dialogues(args.eval_file, data_root=args.data_root) if args.eval_file else []
    print(f"{len(dialogues)} dialogues to train on, {len(held_out)} held out")
    for note in unused_notes([*dialogues, *held_out]):
        print(f"note: {note}")
    for note in leakage.notes(args.eval_file, held_out, args.train_file, dialogues) if args.eval_file else ():
        print(f"note: {note}")
    if args.distill_weight and (untaught := sum(in_words(dialogue.messages) is None for dialogue in dialogues)):
        print(
            f"note: --distill_weight has no effect on {untaught} of {len(dialogues)} dialogues, which have a clip "
            "without `transcript`: they are learned from their answers alone"
        )

    saved = saved_arguments(resumed) if resumed else None
    given = args
    args, notes = settled(given, all_steps(given, len(dialogues)), saved)
    for note in notes:
        print(f"note: {note}")
    set_up_torch(args)
    train_file_sha256 = disk.file_sha256(args.train_file)
    state = TrainState.load(resumed) if resumed else TrainState(train_file_sha256=train_file_sha256)
    if resumed:
        adopt_changes(args, resumed, state, train_file_sha256)
    kinds = {message.kind for dialogue in dialogues for message in dialogue.messages if message.kind}
    earlier = read_checkpoint(args.init_from, trained_kinds) if args.init_from and not resumed else []
    state.kinds = sorted(kinds.union(state.kinds, earlier))
    torch.manual_seed(args.seed)
    model, processor = build(args, resumed)
    session = assemble_run(args, model, processor, dialogues, held_out, state, [*callbacks, *trackers])
    describe(session)
    if resumed:
        restore(session, resumed)
        put_later_aside(folder, resumed)
    write_config(given, folder, resumed)

    on_begin(session)

    def work() -> int:
        try_kernels(session)
        return go(session, processor, dialogues)

    return in_events(session, resumed, work)


def go(session: Session, processor: Qwen3AudioProcessor, dialogues: list[Dialogue]) -> int:
    args, state = session.args, session.state
    steps = step_samples(
        EncodedDialogues(dialogues, collator_for(args, processor, session.executor.model)),
        samples_per_step=args.samples_per_step,
        seed=args.seed,
        epoch=state.epoch,
        offset=state.offset,
        num_workers=args.dataloader_num_workers,
    )
    code = train(session, steps)
    if code:
        saved = bool(checkpoints(session.log.folder))  # not before the first step
        go_on = resume_command(session.log.folder) if saved else start_command(session.log.folder)
        print(f"stopped by a signal after step {state.step}; go on with: {go_on}", file=sys.stderr)
    else:
        refuse_to_have_learned_nothing(session)
        print(closing_line(session))
    return code


def find_resume_point(args: TrainArguments, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None for a new run, which must not overwrite another."""
    if not args.resume_from_checkpoint:
        if checkpoints(folder):
            raise UsageError(
                f"--output_dir {folder} holds another run. To go on with it: {resume_command(folder)}. "
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
        print(f"passed over a damaged checkpoint: {line}", file=sys.stderr)
    if newest is None and passed_over:
        raise CheckpointError(f"{folder}: no checkpoint is whole and finite; start again in another folder")
    if newest is None:
        raise nothing_to_resume(folder)
    print(f"resuming from {newest}")
    return newest


def refuse_missing_run(args: TrainArguments) -> None:
    """Raises UsageError for a resume in a folder that is no run's. Nothing is made there, not even the lock."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint == "latest" and not (holds_run(folder) or (folder / CONFIG_FILE).exists()):
        raise nothing_to_resume(folder)


def nothing_to_resume(folder: Path) -> UsageError:
    looked = f"--resume_from_checkpoint: there is no checkpoint in {os.path.abspath(folder)} (--output_dir)"
    if not folder.is_dir():
        return UsageError(f"{looked}, and no such folder: give the run's folder, or --config with its {CONFIG_FILE}")
    if (folder / CONFIG_FILE).exists() and written_by_a_run(folder / CONFIG_FILE):
        return UsageError(f"{looked}: the run ended before its first one. To start it again: {start_command(folder)}")
    return UsageError(f"{looked}: give the run's folder, or start a new run without --resume_from_checkpoint")


def given_checkpoint(path: Path, folder: Path) -> Path:
    """A checkpoint that was named, wherever it lies: also a copy of one of this run, or where a new folder goes on from
    another run.
    """
    path = path.resolve()  # its name and its parent are asked for, and `.` and links have others
    if not path.is_dir() or checkpoints(path):
        raise UsageError(
            f"--resume_from_checkpoint {path}: no checkpoint-N folder. Without a value it takes the newest of "
            f"--output_dir {folder}"
        )
    check_usable(path)
    own, saved_by = folder.resolve(), output_dir_of(path).resolve()
    if own not in (path.parent, saved_by) and holds_run(folder) and saved_by not in former_places(folder):
        raise UsageError(
            f"--output_dir {folder} holds another run than {path}, which was saved by the one in {saved_by}: give a "
            "new folder, or copy the checkpoint into its run's; nothing was changed"
        )
    return path


def holds_run(folder: Path) -> bool:
    """Whether a run has saved a checkpoint there, or there is a config.yaml that no run wrote. Neither is overwritten;
    a run that ended before its first checkpoint may be started anew.
    """
    config = folder / CONFIG_FILE
    return bool(checkpoints(folder)) or (config.exists() and not written_by_a_run(config))


def former_places(folder: Path) -> set[Path]:
    """Where a run that has moved to `folder` lay when it saved its checkpoints."""
    places = set()
    for path in checkpoints(folder):
        with suppress(CheckpointError):
            places.add(output_dir_of(path).resolve())
    return places


def put_later_aside(folder: Path, resumed: Path) -> None:
    """Renames the checkpoints after the one that is resumed, and says so."""
    for path in folders.put_aside_later(folder, resumed):
        print(f"a checkpoint of a later step is put aside: {path}")


def adopt_changes(args: TrainArguments, resumed: Path, state: TrainState, train_file_sha256: str) -> None:
    """Says what is different this time; a changed pack size wins over the one that the run had settled on."""
    changed = changed_arguments(args, resumed)
    if state.train_file_sha256 != train_file_sha256 or changed.keys() & DECIDE_THE_LOSS:
        state.learning = Learning()  # losses of before can't be compared with those to come
    if "max_tokens_per_pack" in changed:
        state.max_tokens_per_pack = None
    if changed:
        told = ", ".join(f"--{name} {now} (was {was})" for name, (was, now) in changed.items())
        print(f"note: {resumed.name} goes on with {told}")
    if state.train_file_sha256 != train_file_sha256:
        print(
            f"note: {args.train_file} has changed since {resumed.name}: the order of samples goes on, their content "
            "may differ"
        )


def start_command(folder: Path) -> str:
    """For a shell, from any current folder."""
    return f"qwhisper train --config {shlex.quote(os.path.abspath(folder / CONFIG_FILE))}"


def resume_command(folder: Path) -> str:
    return f"{start_command(folder)} --resume_from_checkpoint"


def set_up_torch(args: TrainArguments) -> None:
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def write_config(args: TrainArguments, folder: Path, resumed: Path | None) -> None:
    """Everything that is needed to run it again from any current folder: `qwhisper train --config` reads it.

    Values that the length of the run decides are left out: a longer one from the same file has its own.
    Where the disk does not take it, a resumed run goes on with what stands there.
    """
    values = absolute(dataclasses.asdict(args))
    values = {name: value for name, value in values.items() if value is not None and name != "resume_from_checkpoint"}
    text = f"{HEADING}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
    try:
        disk.write_whole(folder / CONFIG_FILE, text)
    except OSError as error:
        if resumed is None or not (folder / CONFIG_FILE).exists():
            raise DiskError(
                f"{folder / CONFIG_FILE}: can't be written ({error}): make room, or give another folder"
            ) from None
        print(f"note: {folder / CONFIG_FILE} is left as it was: {error}")


def describe(session: Session) -> None:
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in session.groups.items()}
    trained = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    print(
        f"training {trained}; {session.total_steps} steps of {session.args.samples_per_step} samples on "
        f"{session.executor.device}"
    )
    args, total = session.args, session.total_steps
    if args.early_lr_steps >= total and args.early_lr_factor < 1:
        print(
            f"note: all {total} steps run at {args.early_lr_factor:g} × the learning rate (--early_lr_steps "
            f"{args.early_lr_steps}): use a longer run or fewer early steps"
        )
    if (steps := warmup_steps(args, total)) >= total:
        print(f"note: all {total} steps are within --warmup_steps {steps}: the learning rate is reached in the last")
    if args.freeze_projector_steps >= total:
        print(
            f"note: the projector does not learn in this run: all {total} steps are within --freeze_projector_steps "
            f"{args.freeze_projector_steps}"
        )


def try_kernels(session: Session) -> None:
    """Every attention kernel that this run uses, on this device, against fp32; a wrong one is named and replaced."""
    longest = session.args.max_length or session.executor.max_tokens_per_pack
    for wrong in check_kernels(session.executor.model, longest):
        session.log.event("kernel_replaced", step=session.state.step, **dataclasses.asdict(wrong))
        session.lines.say(str(wrong))
