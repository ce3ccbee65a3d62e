"""A training from its arguments to its exit code: read the data, build the session, train, report the end.

All checks that need no model run before one is loaded.
"""

import dataclasses
import pickle
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, suppress
from functools import partial
from pathlib import Path

import torch
from transformers import TrainerCallback

from qwhisper.checkpoint.folders import checkpoints
from qwhisper.data import leakage
from qwhisper.data.ahead import one_ahead
from qwhisper.data.dialogue import Dialogue, in_words, read_dialogues, unused_notes
from qwhisper.data.encode import DialogueEncoder
from qwhisper.data.light_tokenizer import dumps
from qwhisper.data.loader import StepSamples, step_samples
from qwhisper.data.processes import Poll
from qwhisper.engine.fp8_check import check_products
from qwhisper.engine.kernels import check_kernels
from qwhisper.errors import MemoryLimitError, first_line
from qwhisper.locks import run_lock
from qwhisper.memory import is_out_of_memory
from qwhisper.report.kinds import KernelReplaced, OutputLost
from qwhisper.report.streams import unfailing_output
from qwhisper.report.terminal import note, quieten_transformers, say
from qwhisper.train.arguments import TrainArguments
from qwhisper.train.ending import closing_line, in_events, refuse_to_have_learned_nothing
from qwhisper.train.features import open_features
from qwhisper.train.fit import fit_to_memory
from qwhisper.train.hf import ConfiguringCallback, tracker_callbacks
from qwhisper.train.loop import train
from qwhisper.train.models import build_model
from qwhisper.train.plan import longest_row, resolve
from qwhisper.train.resume import refuse_missing_data, saved_arguments
from qwhisper.train.session import Session, build_session
from qwhisper.train.signals import Stopped, StopSignals
from qwhisper.train.start import (
    continue_command,
    find_resume_point,
    put_later_aside,
    refuse_missing_run,
    resume_command,
    state_at_start,
    write_config,
)


def main(
    args: TrainArguments, callbacks: Sequence[TrainerCallback] = (), write_data: Callable[[], None] = lambda: None
) -> int:
    """Run a training and return its exit code. callbacks: any `TrainerCallback`s; ours configure the run.

    write_data: writes data files that the arguments name; called after the checks of the run folder.
    """
    begun: list[Session] = []  # empty after a refusal, which must not log: the folder may be another run's

    def log_lost_output(lines: int) -> None:
        for session in begun:
            session.report(OutputLost(lines=lines))

    with unfailing_output(on_lost=log_lost_output):
        return configure_and_go(args, callbacks, begun.append, write_data)


def configure_and_go(
    args: TrainArguments,
    callbacks: Sequence[TrainerCallback],
    on_begin: Callable[[Session], None],
    write_data: Callable[[], None],
) -> int:
    for callback in callbacks:
        if isinstance(callback, ConfiguringCallback):
            args = callback.configure(args)
    quieten_transformers()
    for sentence in args.notices():
        note(sentence)
    refuse_missing_run(args)
    try:
        with run_lock(Path(args.output_dir)):
            return prepare_and_go(args, callbacks, on_begin, write_data)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        folder = Path(args.output_dir)
        go_on = f", then resume with: {resume_command(folder)}" if checkpoints(folder) else ""
        raise MemoryLimitError(
            f"out of memory outside of a forward and backward pass, where a smaller pack does not help: "
            f"{first_line(error)}. Use --load_in_fp8, --load_in_4bit, --whisper_cpu, --gradient_checkpointing or a "
            f"smaller --text_model or --lora_r{go_on}"
        ) from error


def prepare_and_go(
    args: TrainArguments,
    callbacks: Sequence[TrainerCallback],
    on_begin: Callable[[Session], None],
    write_data: Callable[[], None],
) -> int:
    folder = Path(args.output_dir)
    resumed = find_resume_point(args, folder)
    write_data()
    trackers = tracker_callbacks(args.report_to)
    if resumed:
        refuse_missing_data(args)
    dialogues, held_out = read_data(args)
    plan = resolve(args, num_dialogues=len(dialogues), saved=saved_arguments(resumed) if resumed else None)
    for sentence in plan.notes:
        note(sentence)
    set_up_torch(args)
    state = state_at_start(args, plan, dialogues, resumed)
    torch.manual_seed(args.seed)
    model, processor = build_model(args, plan, resumed)
    fit_to_memory(model, args, dialogues, state, plan.total_steps)
    all_callbacks = [*callbacks, *trackers]
    with StopSignals() as signals:
        session: Session | None = None
        with suppress(Stopped):
            session = build_session(
                args, plan, model, processor, dialogues, held_out, state, all_callbacks,
                resumed=resumed, poll=signals.poll,
            )  # fmt: skip
            session.features = open_features(args, session.executor, dialogues, signals.poll)
        if resumed:
            put_later_aside(folder, resumed)
        write_config(args, folder, resumed)
        if session is None:
            say_stopped(folder, resumed, state.step)
            return signals.exit_code
        announce(session)
        on_begin(session)
        try:
            return in_events(session, resumed, partial(go, session, resumed, signals))
        finally:
            if session.features is not None:
                session.features.close()


def read_data(args: TrainArguments) -> tuple[list[Dialogue], list[Dialogue]]:
    """Read the dialogues to train on and the held-out ones, and print notes on them."""
    dialogues = read_dialogues(args.train_file, data_root=args.data_root, max_samples=args.max_samples)
    held_out = read_dialogues(args.eval_file, data_root=args.data_root) if args.eval_file else []
    say(f"{len(dialogues)} dialogues to train on, {len(held_out)} held out")
    for sentence in unused_notes([*dialogues, *held_out]):
        note(sentence)
    for sentence in leakage.notes(args.eval_file, held_out, args.train_file, dialogues) if args.eval_file else ():
        note(sentence)
    if args.distill_weight and (untaught := sum(in_words(dialogue.messages) is None for dialogue in dialogues)):
        note(
            f"--distill_weight has no effect on {untaught} of {len(dialogues)} dialogues, which have a clip "
            "without `transcript`: their loss is cross-entropy alone"
        )
    return dialogues, held_out


def say_stopped(folder: Path, resumed: Path | None, step: int) -> None:
    go_on = continue_command(folder, resumed)
    say(f"stopped by a signal after step {step}; continue with: {go_on}", to_stderr=True)


def go(session: Session, resumed: Path | None, signals: StopSignals) -> int:
    with suppress(Stopped):  # after a signal `train` ends before its first step
        try_kernels(session, signals)
    with reading(session, signals.poll) as steps:
        code = train(session, steps, signals)
    if code:
        say_stopped(session.log.folder, resumed, session.state.step)
    else:
        refuse_to_have_learned_nothing(session)
        say(closing_line(session))
    return code


def reading(session: Session, poll: Poll) -> AbstractContextManager[Iterator[StepSamples]]:
    """A context that gives the samples of each step. With data workers, a thread takes them from the workers and builds
    their batches, one step ahead.
    """

    def steps(encoder: DialogueEncoder, poll: Poll) -> Generator[StepSamples]:
        workers = session.args.dataloader_num_workers
        return step_samples(session.source, encoder, position=session.state.position, num_workers=workers, poll=poll)

    def prepared(poll: Poll) -> Generator[StepSamples]:
        with closing(steps(own, poll)) as unprepared:
            for step in unprepared:
                session.executor.prepare(step.samples)
                yield step

    encoder = session.encoder
    if session.features is not None:
        encoder = encoder.with_features(session.features.reader)
    if not session.args.dataloader_num_workers:
        return closing(steps(encoder, poll))
    own = pickle.loads(dumps(encoder))  # two threads must not use one tokenizer
    return one_ahead(prepared, poll)


def set_up_torch(args: TrainArguments) -> None:
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def announce(session: Session) -> None:
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in session.groups.items()}
    trained = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    say(
        f"training {trained}; {session.total_steps} steps of {session.args.samples_per_step} samples on "
        f"{session.executor.device}"
    )
    args, plan, total = session.args, session.plan, session.total_steps
    if plan.early_lr_steps >= total and args.early_lr_factor < 1:
        note(
            f"all {total} steps run at {args.early_lr_factor:g} × the learning rate (--early_lr_steps "
            f"{plan.early_lr_steps}): use a longer run or fewer early steps"
        )
    if plan.num_warmup_steps >= total:
        note(
            f"all {total} steps are within --warmup_steps {plan.num_warmup_steps}: only the last has the full "
            "learning rate"
        )
    if plan.freeze_projector_steps >= total:
        note(
            f"the projector does not learn in this run: all {total} steps are within --freeze_projector_steps "
            f"{plan.freeze_projector_steps}"
        )


def try_kernels(session: Session, signals: StopSignals) -> None:
    """Compare every attention kernel and fp8 product of this run with fp32, on this device; report and replace a wrong
    one.
    """
    model, longest = session.executor.model, longest_row(session.args, session.executor.max_tokens_per_pack)
    for wrong in [*check_products(model, signals.poll), *check_kernels(model, longest, signals.poll)]:
        session.report(KernelReplaced(**dataclasses.asdict(wrong)))
