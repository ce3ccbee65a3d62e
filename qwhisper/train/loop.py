"""The training loop.

`train_step` reads top to bottom: fetch, count, run, check, clip, step or skip, schedule, report.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from qwhisper.checkpoint.folders import newest_valid
from qwhisper.data.loader import StepSamples
from qwhisper.engine.executor import generators_as_now
from qwhisper.errors import DataError, DiskError, MemoryLimitError, NumericalError, first_line
from qwhisper.guards.decide import Decision, decide
from qwhisper.guards.gradients import drop_gradients, group_checksums, scale_gradients
from qwhisper.memory import is_out_of_memory
from qwhisper.train.context import Run, StepReport
from qwhisper.train.monitor import log_clamped, log_step, log_window, readable, watch
from qwhisper.train.recovery import after_step, drop_bad_samples, keep_sound, num_supervised, run_samples, take_snapshot
from qwhisper.train.signals import Stopped, StopSignals
from qwhisper.train.state import TrainState


def train_step(run: Run, fetched: StepSamples) -> StepReport:
    """One optimizer step on the given samples: the same mathematics however they are packed.

    Samples whose loss or gradient is not finite are left out and named. A step that is skipped, because no sample is
    left or the sum of their gradients is not finite, leaves parameters, moments and Adam's step counts untouched;
    learning rate and data go on. Raises Stopped where a signal ends it between two packs, half done.
    """
    args, guards, samples, frozen = run.args, run.state.guards, fetched.samples, run.frozen_groups

    statistics = run_samples(run, samples, num_supervised(samples))
    if statistics.not_finite and not statistics.broken_weights:
        samples, statistics = drop_bad_samples(run, samples, statistics)
    quarantine(run, fetched)  # written and counted only now: until here the step may be given up
    bounds = {"lora": args.lora_grad_clip}
    decision = decide(statistics, guards.averages, group_bounds=bounds, max_grad_norm=args.max_grad_norm)
    skipped, tokens = decision.skip or (None if samples else "no sample left"), num_supervised(samples)

    if skipped:
        run.state.skipped_steps += 1
        ids = [sample.id for sample in fetched.samples]
        norms = readable({"loss": statistics.loss, **statistics.gradients})
        run.log.event("skipped", step=run.state.step, reason=skipped, statistics=norms, samples=ids)
    else:
        scale_gradients(decision, run.groups)
        run.fire("on_pre_optimizer_step")
        run.optimizer.step()
        run.fire("on_optimizer_step")
        guards.loss_scale.step_taken()
    drop_gradients(run.groups)
    run.scheduler.step()

    passes_before = run.state.epoch
    run.state.step += 1
    run.state.epoch, run.state.offset = fetched.epoch, fetched.offset
    run.state.supervised_tokens += tokens
    run.state.learning.observe(statistics.loss, 0 if skipped else tokens, pass_ended=run.state.epoch > passes_before)
    if fetched.samples:
        guards.feed(statistics, decision)
        answer_spikes(run, statistics.loss, decision, [sample.id for sample in samples])
    after_step(run, statistics, decision, [sample.id for sample in fetched.samples])
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
        divergence=None if skipped or run.executor.divergence is None else float(run.executor.divergence),
    )


def train(run: Run, steps: Iterator[StepSamples]) -> int:
    """Runs to the end, or to a signal, and leaves a checkpoint.

    Returns the exit code: 0, or 128 + the number of a signal that left something to do. Raises DiskError where the last
    one can't be written.
    """
    with StopSignals() as signals:
        saved = take_steps(run, steps, signals)
    run.fire("on_train_end")
    if not saved:
        newest, _ = newest_valid(run.log.folder)
        raise DiskError(
            f"step {run.state.step} could not be saved (events.jsonl says why); {last_whole(newest)}. Make room on the "
            f"disk or repair it, then {'resume' if newest else 'start again'}"
        )
    finished = run.state.step >= run.total_steps and not evaluation_is_due(run)
    return 128 + signals.received if signals.received and not finished else 0


def take_steps(run: Run, steps: Iterator[StepSamples], signals: StopSignals) -> bool:
    """Whether what was reached is saved."""
    args, state = run.args, run.state
    # A skipped first step is meant: the schedule goes on, the optimizer does not.
    warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
    run.executor.model.train()
    run.executor.before_pack = signals.between_packs
    if not (run.snapshots.sound() if run.snapshots.kept else take_snapshot(run)):
        raise NumericalError("a weight or moment is not finite before the first step: start from another checkpoint")
    run.fire("on_train_begin")
    if not state.step:
        begin_to_learn(run, signals)
    window: list[StepReport] = []
    last_saved: int | None = state.step
    try:
        if evaluation_is_due(run):  # a signal came in the middle of it
            evaluate(run, signals)
            last_saved = state.step if is_best(run) and save(run) else None
        while state.step < run.total_steps and not run.hooks.control.should_training_stop:
            begun = time.perf_counter()
            fetched = signals.unless_stopped(lambda: next(steps))
            if fetched is None:
                break
            put_back = as_before_step(run)
            run.fire("on_step_begin")
            rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
            try:
                report = train_step(run, fetched)
            except Stopped:
                put_back()
                run.lines.say(f"step {state.step + 1}: given up for a signal; it is taken when the run is resumed")
                break
            learning_rates = rates
            report.seconds = time.perf_counter() - begun
            window.append(report)
            log_step(run, report, learning_rates)
            run.fire("on_step_end", step_report=report)
            due = state.step % args.save_steps == 0
            watch(run, report, learning_rates, signals, save_is_due=due or at_end(run) or evaluation_is_due(run))
            if state.step % args.logging_steps == 0 or at_end(run):
                log_window(run, window, max(learning_rates.values()))
                window = []
            if evaluation_is_due(run):
                evaluate(run, signals)
            if (due or is_best(run)) and not at_end(run) and save(run):
                last_saved = state.step
        if window:  # before the save, which holds what has been logged
            log_window(run, window, max(learning_rates.values()))
            window = []
        return last_saved == state.step or save(run, stopped=not at_end(run))
    finally:
        if window:
            log_window(run, window, max(learning_rates.values()))
        run.lines.close()


def as_before_step(run: Run) -> Callable[[], None]:
    """Called, it puts back what a step changes while it has packs to run; all else is changed only after the last."""
    loss_scale, pack_size = dataclasses.replace(run.state.guards.loss_scale), run.executor.max_tokens_per_pack
    put_generators_back = generators_as_now(run.executor.device)
    put_count_back = run.clamp.count_as_now() if run.clamp else None

    def put_back() -> None:
        drop_gradients(run.groups)
        put_generators_back()
        if put_count_back:
            put_count_back()
        run.state.guards.loss_scale, run.executor.max_tokens_per_pack = loss_scale, pack_size

    return put_back


def at_end(run: Run) -> bool:
    return run.state.step == run.total_steps


def is_best(run: Run) -> bool:
    return run.state.best_checkpoint == f"checkpoint-{run.state.step}"


def evaluation_is_due(run: Run) -> bool:
    step = run.state.step
    on_schedule = step > 0 and (step % run.args.eval_steps == 0 or at_end(run))
    return bool(run.eval_samples) and on_schedule and step != run.state.evaluated


def quarantine(run: Run, fetched: StepSamples) -> None:
    """Names bad dialogues; ends the run when they are more than --max_bad_fraction of the data."""
    for death in fetched.deaths:
        run.log.event("worker_died", step=run.state.step, **dataclasses.asdict(death))
        run.lines.say(f"step {run.state.step}: a process that reads data was lost ({death.how}); read again from there")
    for rejection in fetched.rejections:
        run.state.bad_samples += 1
        run.log.quarantine(**dataclasses.asdict(rejection), step=run.state.step)
    for sample in fetched.samples if run.state.epoch == 0 else []:
        if said := [*sample.events, *sample.notes]:  # a long dialogue cut at a turn, and the like
            run.log.event("sample_changed", step=run.state.step, samples=[sample.id], what=said)
    passes = 1 + run.state.epoch
    if fetched.rejections and run.state.bad_samples > run.args.max_bad_fraction * run.num_dialogues * passes:
        raise DataError(
            f"{run.state.bad_samples} times a dialogue could not be used (of {run.num_dialogues}, in pass {passes} "
            f"over them), more than --max_bad_fraction {run.args.max_bad_fraction}; the last: "
            f"{fetched.rejections[-1].reason}. All are in {run.log.folder / 'quarantine.jsonl'}: repair or remove "
            "them, or raise the bound"
        )


def answer_spikes(run: Run, loss: float, decision: Decision, ids: list[str]) -> None:
    """Names spikes, which the clamp answers; --dynamic_lr answers peaks and the loss."""
    step, guards = run.state.step, run.state.guards
    if decision.spikes:
        times = {name: round(times_average, 2) for name, times_average in decision.spikes.items()}
        run.log.event("gradient_spike", step=step, times_average=times, samples=ids)
    if run.args.dynamic_lr and guards.rate.observe(loss, bool(decision.peaks or decision.skip)):
        run.set_learning_rates()
        run.log.event("learning_rate", step=step, dynamic_factor=guards.rate.factor)
    spiked = bool(decision.spikes or decision.skip)
    if run.clamp and run.args.activation_clamp == "auto" and (turned := guards.clamp.observe(spiked)):
        log_clamped(run, run.clamp)
        run.clamp.on = guards.clamp.on
        told = {"turned": turned, "module": run.clamp.name, "bound": run.clamp.bound, "values": guards.clamp.clamped}
        run.log.event("activation_clamp", step=step, **told)
        after = f" after {guards.clamp.clamped} values" if turned == "off" else ""
        run.lines.say(f"step {step}: activation clamp {turned}{after} (±{run.clamp.bound:g} before {run.clamp.name})")


def begin_to_learn(run: Run, signals: StopSignals) -> None:
    """What the end of the run is compared with: the weights, and the held-out loss where there is a file for it."""
    run.state.learning.weights = group_checksums(run.groups)
    if run.eval_samples and (loss := held_out_loss(run, signals)) is not None:
        run.state.learning.evaluated(loss, before_first_step=True)
        report_held_out(run, loss, "")


def evaluate(run: Run, signals: StopSignals) -> None:
    """Held-out loss over all supervised tokens; remembers the best step, whose checkpoint is kept."""
    state, loss = run.state, held_out_loss(run, signals)
    if loss is None:
        return
    state.evaluated = state.step
    state.learning.evaluated(loss, before_first_step=False)
    best = improves(loss, state.best_loss)
    if best:
        state.best_loss, state.best_checkpoint = loss, f"checkpoint-{state.step}"
    report_held_out(run, loss, " (best so far)" if best else "")


def held_out_loss(run: Run, signals: StopSignals) -> float | None:
    """None where a signal came meanwhile, or where memory does not suffice, which counts as an evaluation."""
    try:
        return signals.unless_stopped(lambda: run.executor.evaluate(run.eval_samples))
    except MemoryLimitError as error:
        run.state.evaluated = run.state.step
        run.log.event("not_evaluated", step=run.state.step, error=str(error))
        run.lines.say(f"step {run.state.step}: held-out loss not measured, training goes on: {error}")
        return None


def report_held_out(run: Run, loss: float, remark: str) -> None:
    run.log.metric(step=run.state.step, **readable({"eval_loss": loss}))
    run.lines.say(f"step {run.state.step}: held-out loss {loss:.4f}{remark}")
    run.fire("on_evaluate", metrics={"eval_loss": loss})
    run.fire("on_log", logs={"eval_loss": loss})


def improves(loss: float, best: float | None) -> bool:
    """Not where it is NaN, which as the first would stay the best for ever: nothing is below it."""
    return math.isfinite(loss) and (best is None or loss < best)


def last_whole(newest: Path | None) -> str:
    return f"the last whole checkpoint is {newest}" if newest else "there is no whole checkpoint"


def save(run: Run, *, stopped: bool = False) -> bool:
    """Whether the disk took a checkpoint. Where it did not, the run goes on and the older ones are as they were.

    It is a snapshot as well, but where the run is stopped early: the uninterrupted one would take none here, and a
    rewind after the resume must find what that one's would. What is not finite is not saved: the run goes back first.
    """
    step = run.state.step
    keep_sound(run, copy=not stopped)
    try:
        folder = run.save(run)
    except Exception as error:
        if not (isinstance(error, OSError) or is_out_of_memory(error)):
            raise
        torch.cuda.empty_cache()
        newest, _ = newest_valid(run.log.folder)
        kept = TrainState.load(newest) if newest else TrainState()
        run.state.best_loss, run.state.best_checkpoint = kept.best_loss, kept.best_checkpoint
        run.log.event("save_failed", step=step, error=first_line(error), last_whole=newest and newest.name)
        run.lines.say(
            f"step {step}: not saved ({first_line(error)}); {last_whole(newest)}. Make room for it: the next save "
            "tries again"
        )
        return False
    run.lines.say(f"step {step}: saved {folder}")
    run.fire("on_save")
    return True
