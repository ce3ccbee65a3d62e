"""The end of a run: its last line, its exit code, and begin, resume and end in events.jsonl."""

import math
import platform
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from qwhisper import __version__
from qwhisper.checkpoint.names import checkpoint_name
from qwhisper.errors import (
    DataError,
    MemoryLimitError,
    NothingLearnedError,
    NumericalError,
    QwhisperError,
    first_line,
)
from qwhisper.guards.gradients import group_checksums
from qwhisper.memory import is_out_of_memory
from qwhisper.report.kinds import Begin, End, Resumed
from qwhisper.train.hf import tracked_as
from qwhisper.train.models import recomputed_layers
from qwhisper.train.session import Session

RUN_ID_LENGTH = 21  # the only length that SwanLab accepts
INTERRUPTED = 130  # by a KeyboardInterrupt that a callback raises: during a run Ctrl-C raises none


def in_events(session: Session, resumed: Path | None, work: Callable[[], int]) -> int:
    """Do the run's `work` and return its exit code. Record begin or resume and the end in events.jsonl, the end also
    after an exception; only a kill leaves no end.
    """
    state, log = session.state, session.log
    run_id = (log.run_id() if resumed else None) or uuid.uuid4().hex[:RUN_ID_LENGTH]
    begin = Begin(
        run_id=run_id,
        qwhisper=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=device_name(session.executor.device),
        total_steps=session.total_steps,
        samples_per_step=session.args.samples_per_step,
        dialogues=session.num_dialogues,
        held_out_samples=session.held_out.num_rows,
        audio_model=session.plan.audio_model,
        text_model=session.plan.text_model,
        max_tokens_per_pack=session.executor.max_tokens_per_pack,
        recompute_layers=recomputed_layers(session.executor.model),
        why_plain=session.executor.why_plain(),
    )
    session.report(Resumed(checkpoint=str(resumed), **begin.written()) if resumed else begin)

    def end(code: int, reason: str) -> None:
        session.report(
            End(
                exit_code=code,
                reason=reason,
                total_steps=session.total_steps,
                skipped_steps=state.skipped_steps,
                supervised_tokens=state.supervised_tokens,
                rewinds=state.guards.rewinds,
                quarantined=len(log.quarantined),
            )
        )

    try:
        with tracked_as(run_id):
            code = work()
    except BaseException as error:
        end(exit_code_of(error), f"{type(error).__name__}: {first_line(error)}")
        raise
    end(code, f"stopped by signal {code - 128}" if code else how_far(session))
    return code


def exit_code_of(error: BaseException) -> int:
    """The exit code that the command line returns."""
    if isinstance(error, QwhisperError):
        return error.exit_code
    if is_out_of_memory(error):
        return MemoryLimitError.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def how_far(session: Session) -> str:
    done = session.state.step >= session.total_steps
    return "done" if done else f"stopped by a callback after {session.state.step} of {session.total_steps} steps"


def refuse_to_have_learned_nothing(session: Session) -> None:
    """Raises DataError or NumericalError if steps were run but no sample was trained on; NothingLearnedError if the
    run's numbers show that it has learned nothing.
    """
    state, log = session.state, session.log
    if not state.step:
        return
    if not state.supervised_tokens or state.skipped_steps >= state.step:
        found = f"nothing was learned: no sample was trained on in {state.step} steps"
        if state.bad_samples and log.quarantined:
            last = next(reversed(log.quarantined.values()))
            raise DataError(
                f"{found}; {len(log.quarantined)} dialogues could not be used, the last: {last}. "
                f"All are in {log.folder / 'quarantine.jsonl'}: repair or replace them, and start again in another "
                "folder"
            )
        raise NumericalError(f"{found}; {log.folder / 'events.jsonl'} has the reason for each step")
    guess = math.log(session.executor.model.config.get_text_config().vocab_size)
    weights = group_checksums(session.groups)
    why = state.learning.nothing(weights, guess=guess, began_trained=session.args.init_from is not None)
    if why is not None:
        rewinds = state.guards.rewinds
        rewound = f", after {rewinds} rewind{'s' * (rewinds != 1)}" if rewinds else ""
        raise NothingLearnedError(
            f"nothing was learned in {state.step} steps{rewound}: {why} "
            f"({in_numbers(session) or 'too few to compare'}). {cure(session)}. "
            f"{saved_in(session)} was written, but don't continue from it"
        )


def cure(session: Session) -> str:
    """What to change in a run that has learned nothing."""
    learning = session.state.learning
    guess = math.log(session.executor.model.config.get_text_config().vocab_size)
    if (
        learning.direction() == "rose"
        or learning.is_dead(guess)
        or learning.held_out_broke
        or session.state.guards.rewinds
    ):
        return "Begin again with a lower --learning_rate and --projector_learning_rate, in another folder"
    return (
        "Check that audio and answers belong together; then begin again with more steps, a higher --learning_rate or "
        "--projector_learning_rate 1e-3, in another folder"
    )


def in_numbers(session: Session) -> str:
    """The numbers that show whether the run has learned."""
    learning, numbers = session.state.learning, []
    if learning.first_held_out is not None and learning.last_held_out is not None:
        numbers.append(f"held-out loss {learning.first_held_out:.3g} → {learning.last_held_out:.3g}")
    first, last = learning.ends()
    if first is not None and last is not None:
        numbers.append(f"loss {first:.3g} → {last:.3g}")
    if learning.gain is not None and learning.noise is not None:
        at = "" if learning.probed == session.state.step else f" at step {learning.probed}"
        numbers.append(f"listening gain {learning.gain:.3f} ± {learning.noise:.3f} nats a token{at}")
    return "; ".join(numbers)


def in_words(session: Session) -> str:
    """What the numbers mean, unless they show that nothing was learned."""
    learning = session.state.learning
    if learning.direction() == "rose":
        return "the loss rose: try a lower --learning_rate"
    if learning.held_out_rose:
        return "the held-out loss rose: try fewer steps, a lower --learning_rate or more data"
    if not learning.learned() and learning.direction() == "flat":
        return (
            "the loss did not fall by more than its noise: use more steps, a higher --learning_rate or "
            "--projector_learning_rate 1e-3"
        )
    if learning.hears is None:
        return "the loss fell" if learning.learned() else "too few steps to tell whether it learns"
    return "it hears" if learning.hears else "it does not hear yet: use more steps, or --projector_learning_rate 1e-3"


def saved_in(session: Session) -> str:
    folder = session.log.folder / (session.state.best_checkpoint or checkpoint_name(session.state.step))
    return str(folder) if folder.exists() else "nothing was saved"


def closing_line(session: Session) -> str:
    """Report what was done and learned; after a clean run that learned, also which flags may be relaxed."""
    state, log, args = session.state, session.log, session.args
    how = f"done: {state.step}" if state.step >= session.total_steps else how_far(session).removesuffix(" steps")
    done = f"{how} steps, {state.supervised_tokens} supervised tokens; {saved_in(session)}"
    if not state.step:
        return done
    said = ": ".join(filter(None, (in_numbers(session), in_words(session))))
    done += f". {said[0].upper()}{said[1:]}"
    if log.kinds or log.quarantined:
        kinds = ", ".join(f"{count} × {kind}" for kind, count in log.kinds.most_common())
        acts = (
            f"Events: {kinds or 'none'}; {state.skipped_steps} steps skipped, {len(log.quarantined)} dialogues "
            "quarantined"
        )
        return f"{done}. {acts}. See events.jsonl and quarantine.jsonl in {log.folder}"
    done += ". No guard had to act"
    if not state.learning.learned() or state.learning.held_out_rose:
        return done
    early = "fewer --early_lr_steps " if session.plan.early_lr_steps else ""
    return f"{done}: a larger --per_device_train_batch_size, {early}or a higher --learning_rate may now be tried" + (
        ", and --manual_loss left out" if args.manual_loss else ""
    )
