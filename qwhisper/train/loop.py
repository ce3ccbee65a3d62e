"""The training loop.

`train_step` reads top to bottom: fetch, count, run, check, clip, step or skip, schedule, report.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from qwhisper.checkpoint.names import checkpoint_name
from qwhisper.checkpoint.reading import newest_usable
from qwhisper.data.encode import LAID_OUT_AGAIN
from qwhisper.data.loader import StepSamples
from qwhisper.data.processes import Poll
from qwhisper.engine.executor import generators_as_now
from qwhisper.errors import DataError, DiskError, MemoryLimitError, NumericalError, first_line
from qwhisper.guards.decide import Decision, decide
from qwhisper.guards.gradients import drop_gradients, group_checksums, scale_gradients
from qwhisper.memory import is_out_of_memory
from qwhisper.report.events import readable
from qwhisper.report.kinds import (
    ActivationClampTurned,
    GradientSpike,
    LearningRateChanged,
    NotEvaluated,
    SampleChanged,
    SaveFailed,
    Skipped,
    WorkerDied,
)
from qwhisper.report.terminal import say
from qwhisper.train.execution import choose_execution, heed_changes
from qwhisper.train.monitor import log_clamped, log_step, log_window, watch
from qwhisper.train.recovery import after_step, drop_bad_samples, keep_sound, num_supervised, run_samples, take_snapshot
from qwhisper.train.session import Session, StepReport, save_checkpoint
from qwhisper.train.signals import Stopped, StopSignals
from qwhisper.train.state import TrainState


def train_step(session: Session, fetched: StepSamples) -> StepReport:
    """Take one optimizer step on the given samples. The way that they are packed does not change the result.

    Samples whose loss or gradient is not finite are left out and named. A step is skipped if no sample is left or the
    sum of the gradients is not finite: parameters, moments and Adam's step counts stay as they are, learning rate and
    data continue. Raises Stopped if a signal ends the step between two packs.
    """
    args, guards, samples, frozen = session.args, session.state.guards, fetched.samples, session.frozen_groups

    if session.features is not None:
        for event in session.features.complete(samples):
            session.report(event)
    statistics, divergence = run_samples(session, samples, num_supervised(samples))
    if statistics.not_finite and not statistics.broken_weights:
        samples, statistics = drop_bad_samples(session, samples, statistics)
        divergence = None  # it may come from a sample that is left out
    quarantine(session, fetched)  # not earlier: until here a signal may abort the step
    bounds = {"lora": args.lora_grad_clip}
    decision = decide(statistics, guards.averages, group_bounds=bounds, max_grad_norm=args.max_grad_norm)
    skipped, tokens = decision.skip or (None if samples else "no sample left"), num_supervised(samples)

    if skipped:
        session.state.skipped_steps += 1
        ids = [sample.id for sample in fetched.samples]
        norms = readable({"loss": statistics.loss, **statistics.gradients})
        session.report(Skipped(reason=skipped, statistics=norms, samples=ids))
    else:
        scale_gradients(decision, session.groups)
        session.fire("on_pre_optimizer_step")
        session.optimizer.step()
        session.fire("on_optimizer_step")
        guards.loss_scale.step_taken()
    drop_gradients(session.groups)
    session.scheduler.step()

    passes_before = session.source.passes(session.state.position)
    session.state.step += 1
    session.state.position = fetched.position
    session.state.supervised_tokens += tokens
    session.state.learning.observe(
        statistics.loss,
        0 if skipped else tokens,
        pass_ended=session.source.passes(session.state.position) > passes_before,
    )
    if fetched.samples:
        guards.feed(statistics, decision)
        answer_spikes(session, statistics.loss, decision, [sample.id for sample in samples])
    after_step(session, statistics, decision, [sample.id for sample in fetched.samples])
    return StepReport(
        loss=statistics.loss,
        tokens=tokens,
        grad_norm=decision.grad_norm,
        skipped=skipped,
        group_norms=statistics.gradients,
        peaks=decision.peaks,
        num_samples=len(samples),
        has_audio=any(sample.windows for sample in samples),
        frozen=frozen,
        divergence=None if skipped or divergence is None else float(divergence),
    )


def train(session: Session, steps: Iterator[StepSamples], signals: StopSignals) -> int:
    """Train to the last step or to a signal, and save a checkpoint. steps: polls `signals` while it waits.

    Returns the exit code: 0, or 128 + the number of the signal if the run is not finished. Raises DiskError if the last
    checkpoint can't be written.
    """
    saved = take_steps(session, steps, signals)
    session.fire("on_train_end")
    if not saved:
        newest, _ = newest_usable(session.log.folder)
        raise DiskError(
            f"step {session.state.step} could not be saved (events.jsonl says why); {last_whole(newest)}. Make room on "
            f"the disk or repair it, then {'resume' if newest else 'start again'}"
        )
    finished = session.state.step >= session.total_steps and not evaluation_is_due(session)
    return 0 if finished else signals.exit_code


def take_steps(session: Session, steps: Iterator[StepSamples], signals: StopSignals) -> bool:
    """Take the steps and return whether the last one is saved."""
    args, state = session.args, session.state
    # If the first step is skipped, the schedule advances and the optimizer does not, on purpose.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    session.executor.model.train()
    session.executor.before_pack, session.executor.while_compiling = signals.between_packs, signals.raising
    if not (session.snapshots.sound() if session.snapshots.kept else take_snapshot(session)):
        raise NumericalError("a weight or moment is not finite before the first step: start from another checkpoint")
    session.fire("on_train_begin")
    choose_execution(session)  # callbacks may have added hooks
    if not state.step:
        begin_to_learn(session, signals)
    window: list[StepReport] = []
    last_saved: int | None = state.step
    try:
        if evaluation_is_due(session):  # a signal interrupted it
            evaluate(session, signals)
            last_saved = state.step if is_best(session) and try_to_save(session) else None
        while state.step < session.total_steps and not session.hooks.control.should_training_stop:
            begun = time.perf_counter()
            try:
                signals.poll()
                fetched = next(steps)
            except Stopped:
                break
            put_back = as_before_step(session)
            session.fire("on_step_begin")
            rates = {group["name"]: group["lr"] for group in session.optimizer.param_groups}
            heed_changes(session)
            try:
                report = train_step(session, fetched)
            except Stopped:
                put_back()
                say(f"step {state.step + 1}: aborted by a signal; a resumed run takes it")
                break
            learning_rates = rates
            report.seconds = time.perf_counter() - begun
            window.append(report)
            log_step(session, report, learning_rates)
            session.fire("on_step_end", step_report=report)
            due = state.step % args.save_steps == 0
            watch(
                session,
                report,
                learning_rates,
                signals,
                save_is_due=due or at_end(session) or evaluation_is_due(session),
            )
            if state.step % args.logging_steps == 0 or at_end(session):
                log_window(session, window, max(learning_rates.values()))
                window = []
            if evaluation_is_due(session):
                evaluate(session, signals)
            if (due or is_best(session)) and not at_end(session) and try_to_save(session):
                last_saved = state.step
        if window:  # before the save, because the checkpoint holds what has been logged
            log_window(session, window, max(learning_rates.values()))
            window = []
        return last_saved == state.step or try_to_save(session, stopped=not at_end(session))
    finally:
        if window:
            log_window(session, window, max(learning_rates.values()))
        session.lines.close()


def as_before_step(session: Session) -> Callable[[], None]:
    """Return a function that undoes what a step changes before its last pack is done; the rest changes only later."""
    loss_scale, pack_size = dataclasses.replace(session.state.guards.loss_scale), session.executor.max_tokens_per_pack
    put_generators_back = generators_as_now(session.executor.device)
    put_count_back = session.clamp.count_as_now() if session.clamp else None

    def put_back() -> None:
        drop_gradients(session.groups)
        put_generators_back()
        if put_count_back:
            put_count_back()
        session.state.guards.loss_scale, session.executor.max_tokens_per_pack = loss_scale, pack_size

    return put_back


def at_end(session: Session) -> bool:
    return session.state.step == session.total_steps


def is_best(session: Session) -> bool:
    return session.state.best_checkpoint == checkpoint_name(session.state.step)


def evaluation_is_due(session: Session) -> bool:
    step = session.state.step
    on_schedule = step > 0 and (step % session.plan.eval_steps == 0 or at_end(session))
    return bool(session.held_out) and on_schedule and step != session.state.evaluated


def quarantine(session: Session, fetched: StepSamples) -> None:
    """Report bad dialogues. Raises DataError if they are more than --max_bad_fraction of the data."""
    for death in fetched.deaths:
        session.report(WorkerDied(how=death.how, samples=death.samples))
    for rejection in fetched.rejections:
        session.state.bad_samples += 1
        session.log.quarantine(**dataclasses.asdict(rejection), step=session.state.step)
    passes_done = session.source.passes(session.state.position)
    for sample in fetched.samples if passes_done == 0 else []:
        if said := [*sample.events, *sample.notes]:  # a long dialogue cut at a turn, and the like
            session.report(SampleChanged(samples=[sample.id], what=said))
    most = session.args.max_bad_fraction * session.num_dialogues * (1 + passes_done)
    if fetched.rejections and session.state.bad_samples > most:
        raise DataError(
            f"{session.state.bad_samples} times a dialogue could not be used (of {session.num_dialogues}, in pass "
            f"{1 + passes_done} over them), more than --max_bad_fraction {session.args.max_bad_fraction}; the last: "
            f"{fetched.rejections[-1].reason}. All are in {session.log.folder / 'quarantine.jsonl'}: repair or remove "
            "them, or raise the bound"
        )


def answer_spikes(session: Session, loss: float, decision: Decision, ids: list[str]) -> None:
    """Report spikes, which switch the clamp; peaks and the loss change the rate of --dynamic_lr."""
    guards = session.state.guards
    if decision.spikes:
        times = {name: round(times_average, 2) for name, times_average in decision.spikes.items()}
        session.report(GradientSpike(times_average=times, samples=ids))
    if session.args.dynamic_lr and guards.rate.observe(loss, bool(decision.peaks or decision.skip)):
        session.set_learning_rates()
        session.report(LearningRateChanged(dynamic_factor=guards.rate.factor))
    spiked = bool(decision.spikes or decision.skip)
    if session.clamp and session.plan.clamp_follows_spikes and (turned := guards.clamp.observe(spiked)):
        log_clamped(session, session.clamp)
        session.clamp.on = guards.clamp.on
        session.report(
            ActivationClampTurned(
                turned=turned,
                module=session.clamp.name,
                bound=session.clamp.bound,
                values=guards.clamp.clamped,
            )
        )


def begin_to_learn(session: Session, signals: StopSignals) -> None:
    """Record what the end of the run is compared with: the weights and, with --eval_file, the held-out loss."""
    session.state.learning.weights = group_checksums(session.groups)
    if session.held_out and (loss := held_out_loss(session, signals)) is not None:
        session.state.learning.evaluated(loss, before_first_step=True)
        report_held_out(session, loss, "")


def evaluate(session: Session, signals: StopSignals) -> None:
    """Measure the held-out loss over all supervised tokens. The checkpoint of the best step is kept."""
    state, loss = session.state, held_out_loss(session, signals)
    if loss is None:
        return
    state.evaluated = state.step
    state.learning.evaluated(loss, before_first_step=False)
    best = improves(loss, state.best_loss)
    if best:
        state.best_loss, state.best_checkpoint = loss, checkpoint_name(state.step)
    report_held_out(session, loss, " (best so far)" if best else "")


def held_out_loss(session: Session, signals: StopSignals) -> float | None:
    """The loss in nats a supervised token; None if a signal came. None also if memory runs out or a held-out dialogue
    can no longer be read: this counts as an evaluation.
    """
    again: dict[str, list[str]] = {}
    try:
        loss = signals.unless_stopped(session.executor, lambda: loss_in_portions(session, signals.poll, again))
    except (MemoryLimitError, DataError) as error:
        session.state.evaluated = session.state.step
        session.report(NotEvaluated(error=str(error)))
        return None
    for sample, what in again.items():
        session.report(SampleChanged(samples=[sample], what=what))
    return loss


def loss_in_portions(session: Session, poll: Poll, again: dict[str, list[str]]) -> float:
    """Mean loss over all supervised tokens of the held-out dialogues, in nats. again: receives the events of samples
    that were laid out again, by sample id. Raises what `poll` raises during a wait.
    """
    losses, tokens = [], []
    with closing(session.held_out.portions(session.args.dataloader_num_workers, poll)) as portions:
        for samples in portions:
            losses.append(session.executor.evaluate(samples))
            tokens.append(sum(sample.num_supervised for sample in samples))
            for sample in samples:
                if events := [event for event in sample.events if event.startswith(LAID_OUT_AGAIN)]:
                    again[sample.id] = events
    return sum(loss * (count / sum(tokens)) for loss, count in zip(losses, tokens, strict=True))


def report_held_out(session: Session, loss: float, remark: str) -> None:
    session.measured({"eval_loss": loss}, f"held-out loss {loss:.4f}{remark}")
    session.fire("on_evaluate", metrics={"eval_loss": loss})
    session.fire("on_log", logs={"eval_loss": loss})


def improves(loss: float, best: float | None) -> bool:
    """Whether `loss` is the best so far. A NaN never is: no loss is below it, so it would stay the best."""
    return math.isfinite(loss) and (best is None or loss < best)


def last_whole(newest: Path | None) -> str:
    return f"the last whole checkpoint is {newest}" if newest else "there is no whole checkpoint"


def try_to_save(session: Session, *, stopped: bool = False) -> bool:
    """Save a checkpoint and return whether it was written; if not, the run continues with the older ones.

    Weights that are not finite are not saved: the run rewinds first. Takes a snapshot as well, unless the run is
    stopped: an uninterrupted run takes none there, and a later rewind must land on the same weights.
    """
    keep_sound(session, copy=not stopped)
    try:
        folder = save_checkpoint(session)
    except Exception as error:
        if not (isinstance(error, OSError) or is_out_of_memory(error)):
            raise
        torch.cuda.empty_cache()
        newest, _ = newest_usable(session.log.folder)
        kept = TrainState.load(newest) if newest else TrainState()
        session.state.best_loss, session.state.best_checkpoint = kept.best_loss, kept.best_checkpoint
        name = newest.name if newest else None
        session.report(SaveFailed(error=first_line(error), last_whole=name, where=last_whole(newest)))
        return False
    say(f"step {session.state.step}: saved {folder}")
    session.fire("on_save")
    return True
